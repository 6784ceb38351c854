"""Load a checkpoint into any engine and layout: each rank reads the stored pieces that overlap its own ranges."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from megatron_tn.checkpoint.files import TensorFile
from megatron_tn.checkpoint.manifest import MANIFEST, CheckpointManifest, Piece, Trainable, rank_file
from megatron_tn.checkpoint.reshard import Grid, Rectangle, bands, overlaps, pieces_of_local_range, span_of, view_of
from megatron_tn.checkpoint.retention import reading
from megatron_tn.checkpoint.shares import everyones_problems, share_of_manifest
from megatron_tn.config import ConfigError, ModelConfig, from_mapping
from megatron_tn.device.threads import in_parallel
from megatron_tn.model.base import Model
from megatron_tn.model.registry import build_model
from megatron_tn.parallel.context import Axis, ParallelContext
from megatron_tn.parallel.fp8_weights import check_device, keep_layer_in_fp8
from megatron_tn.parallel.linear import SplitLinear
from megatron_tn.parallel.sharding import OwnedRange, mark
from megatron_tn.parallel.world import anywhere

InMemory = Mapping[str, Sequence[tuple[int, np.ndarray]]]  # file -> (first byte, uint8 [n]) of what is in memory of it
BAND_ELEMENTS = 2 << 20  # fp32, of one read: 8 MiB
SMALL_GAP = 256  # fp32 elements between two rows: up to this gap, one read is faster than two


class Reader:
    """Open files of one checkpoint, locked against removal by a run's retention. Use as a context manager.

    direct: see `TensorFile`. contents: file -> what is in memory of it.

    Raises:
        ConfigError: a file is missing or damaged, a tensor is incomplete or of another shape.
    """

    def __init__(
        self,
        directory: Path,
        manifest: CheckpointManifest,
        *,
        direct: bool = False,
        contents: InMemory | None = None,
    ):
        self.directory = directory
        self.manifest = manifest
        self.direct = direct
        self.contents = contents or {}
        self._files: dict[str, TensorFile] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Reader:
        self._stack.enter_context(reading(self.directory))
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def fill(self, kind: str, name: str, shape: tuple[int, ...], piece: Piece, destination: Tensor) -> None:
        """Fill `destination` [piece.stop - piece.start], contiguous, with `piece` of logical tensor kind/name."""
        for read in self.reads(kind, name, shape, piece, destination):
            read()

    def reads(
        self, kind: str, name: str, shape: tuple[int, ...], piece: Piece, destination: Tensor
    ) -> Iterator[Callable[[], None]]:
        """`fill` as calls that may run in any order and in several threads, each for a band of the tensor."""
        stored_shape = self.manifest.shapes.get(name)
        if stored_shape != list(shape):
            raise ConfigError(f"{self.directory}: {name} has shape {stored_shape}, but the model needs {list(shape)}")
        filled = 0
        for stored in self.manifest.pieces.get(f"{kind}/{name}", []):
            for rectangle in overlaps(stored, piece):
                for band in bands(rectangle, BAND_ELEMENTS):
                    filled += (band.bottom - band.top) * (band.right - band.left)
                    yield partial(_read, self._open(stored.file), stored, band, view_of(piece, destination, band))
        if filled != piece.stop - piece.start:
            missing = piece.stop - piece.start - filled
            raise ConfigError(f"{self.directory}: {missing} elements of {kind}/{name} are in none of its files")

    def rng(self, rank: int) -> dict[str, Tensor]:
        stored = self._open(rank_file(rank))
        return {key: stored.get(key) for key in stored.entries if key.startswith("rng/")}

    def _open(self, name: str) -> TensorFile:
        if name not in self._files:
            file = TensorFile(self.directory / name, direct=self.direct, content=self.contents.get(name, ()))
            self._files[name] = self._stack.enter_context(closing(file))
        return self._files[name]


@torch.no_grad()
def _read(file: TensorFile, stored: Piece, band: Rectangle, target: Tensor) -> None:
    """Fill `target` [rows, columns], a view of fp32 values or of another type, with `band` of the piece `stored`.

    Rows at most SMALL_GAP elements apart are read as one range. Otherwise each row is read alone: a rank that needs one
    eighth of every row copies no more than that from the page cache, into which the rows come once for all ranks of a
    machine (`TensorFile.read_rows`).
    """
    (first, last), pitch = span_of(stored, band), Grid.of(stored).width
    if (values := file.view(stored.key, first, last - first)) is not None:
        target.copy_(view_of(stored, values, band, first))
    elif len(target) > 1 and pitch - target.shape[1] > SMALL_GAP:
        rows = torch.empty(target.shape)
        file.read_rows(stored.key, first, pitch, rows)
        target.copy_(rows)
    elif target.dtype == torch.float32 and target.is_contiguous() and target.numel() == last - first:
        file.read(stored.key, first, target.view(-1))
    else:
        values = torch.empty(last - first)
        file.read(stored.key, first, values)
        target.copy_(view_of(stored, values, band, first))


def load_checkpoint(engine: Trainable, directory: Path, contents: InMemory | None = None) -> CheckpointManifest:
    """Restore masters, optimizer state and step and, at the same world size, RNG states. Returns the manifest, of
    several ranks with the pieces that this one needs. Collective.

    contents: file -> what is in memory of it (`ReadAhead.contents`).

    Raises:
        ConfigError: on every rank: the checkpoint is damaged, or of another model or optimizer.
    """
    manifest = _share(engine, directory)
    _on_all_ranks(engine, partial(fill_owned, engine, directory, manifest, contents))
    engine.refresh(manifest.optimizer_step)
    return manifest


def fill_owned(
    engine: Trainable,
    directory: Path,
    manifest: CheckpointManifest,
    contents: InMemory | None = None,
) -> None:
    """Fill this rank's masters and optimizer state, and RNG states of the same world size, from files of a checkpoint.

    Raises:
        ConfigError: as `load_checkpoint`.
    """
    # A checkpoint made of released weights has no optimizer state: its moments begin at zero.
    if manifest.state_kinds and set(manifest.state_kinds) != set(engine.state_kinds):
        raise ConfigError(
            f"{directory} holds {', '.join(manifest.state_kinds)} of each parameter, but this run's optimizer keeps "
            f"{', '.join(engine.state_kinds)}: resume with the optimizer that saved the checkpoint"
        )
    context, specs = engine.context, engine.model.shard_specs()
    _zero(engine)
    # Ranks that own the same elements read them through the page cache: from the disk they come once.
    with Reader(directory, manifest, direct=engine.partitioned or context.data.size == 1, contents=contents) as reader:
        reads = (
            read
            for owned, piece, place in _owned_pieces(engine)
            for kind in (owned.values if manifest.state_kinds else ["param"])
            for read in reader.reads(kind, owned.name, specs[owned.name].shape, piece, owned.values[kind][place])
        )
        in_parallel(lambda read: read(), reads)
        if math.prod(manifest.layout.values()) == context.world_size:
            rng = reader.rng(context.rank)
            if "rng/cpu" in rng:
                torch.set_rng_state(rng["rng/cpu"])
            if torch.cuda.is_available() and "rng/cuda" in rng:
                torch.cuda.set_rng_state(rng["rng/cuda"])


def _on_all_ranks(engine: Trainable, fill: Callable[[], None]) -> None:
    """Call `fill()`, which loads what one rank owns. Raises ConfigError on every rank if it does on any: the others
    would wait for that one in the next collective. Collective."""
    problems: list[str] = []
    try:
        fill()
    except ConfigError as error:
        problems = error.problems
    if anywhere(bool(problems)):
        raise ConfigError(everyones_problems(problems, engine.context.rank, engine.context.world_size))


def _owned_pieces(engine: Trainable) -> Iterator[tuple[OwnedRange, Piece, slice]]:
    """What this rank owns, as pieces of logical tensors, each with its place in the owned range."""
    axis, specs = engine.context.tp, engine.model.shard_specs()
    for owned in engine.owned_ranges():
        spec = specs[owned.name]
        for piece, at in pieces_of_local_range(spec, axis.rank, axis.size, owned.start, owned.stop):
            yield owned, piece, slice(at, at + piece.stop - piece.start)


def _share(engine: Trainable, directory: Path) -> CheckpointManifest:
    """The manifest with the pieces that this rank needs. Collective."""
    wanted: dict[str, list[Piece]] = {}
    for owned, piece, _ in _owned_pieces(engine):
        wanted.setdefault(owned.name, []).append(piece)
    return share_of_manifest(directory, wanted, engine.context)


def _zero(engine: Trainable) -> None:
    """Zero masters and state before reading: padding is in no file, and uninitialised memory may hold NaN."""
    for owned in engine.owned_ranges():
        for values in owned.values.values():
            values.zero_()


class Weights(Protocol):
    """A stored model without optimizer state: a checkpoint's, or one in the released layout.

    shapes: parameter -> logical shape. dtypes: parameter -> the type that its values were rounded to.
    """

    config: ModelConfig
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    def fill(self, name: str, piece: Piece, destination: Tensor) -> None:
        """Fill `destination` [piece.stop - piece.start], contiguous, with that piece of the parameter `name`."""
        ...


class CheckpointWeights:
    """`Weights` of a checkpoint: masters rounded to the precision that it was trained in, since the model that was
    trained is the one with rounded weights. Use as a context manager.

    manifest: the checkpoint's, with the pieces of a rank's share at least; None: reads it.
    """

    def __init__(self, directory: Path, manifest: CheckpointManifest | None = None):
        self.manifest = manifest or CheckpointManifest.read(directory)
        self.config = from_mapping(ModelConfig, self.manifest.config["model"])
        if problems := self.config.problems():
            raise ConfigError([f"{directory / MANIFEST}: config: {problem}" for problem in problems])
        trained = torch.bfloat16 if self.manifest.config["engine"].get("precision") == "bf16" else torch.float32
        self.shapes = {name: tuple(shape) for name, shape in self.manifest.shapes.items()}
        self.dtypes = dict.fromkeys(self.shapes, trained)
        self._reader = Reader(directory, self.manifest)

    def __enter__(self) -> CheckpointWeights:
        self._reader.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._reader.__exit__(*error)

    def fill(self, name: str, piece: Piece, destination: Tensor) -> None:
        self._reader.fill("param", name, self.shapes[name], piece, destination)
        if destination.dtype != self.dtypes[name]:
            destination.copy_(destination.to(self.dtypes[name]))


def load_checkpoint_weights(engine: Trainable, directory: Path) -> None:
    """`load_weights` of a checkpoint, whose manifest rank 0 alone reads. Collective."""
    with CheckpointWeights(directory, _share(engine, directory)) as weights:
        load_weights(engine, weights)


@torch.no_grad()
def load_weights(engine: Trainable, weights: Weights) -> None:
    """Fill the masters with `weights`, of the same model; the optimizer begins afresh. Collective.

    Raises:
        ConfigError: on every rank: a file is missing or damaged.
    """
    _zero(engine)

    def fill() -> None:
        for owned, piece, place in _owned_pieces(engine):
            values = torch.empty(piece.stop - piece.start)
            weights.fill(owned.name, piece, values)
            owned.values["param"][place].copy_(values)

    _on_all_ranks(engine, fill)
    engine.refresh(optimizer_step=0)


def model_of(
    weights: Weights,
    context: ParallelContext | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    fp8_weights: bool = False,
) -> Model:
    """The model with these weights; each rank of `context` reads its own parts. dtype None: that of the weights.

    fp8_weights: as after `keep_in_fp8`. A matrix is converted before the next one is read, so that the device never
    holds more than one of the converted matrices in `dtype`.

    Raises:
        ConfigError: the model does not fit the layout, the weights do not fit the model, or a GPU cannot convert fp8
            numbers.
    """
    context = context or ParallelContext()
    if fp8_weights:
        check_device(torch.device(device))
    model = build_model(weights.config, context, "meta", dtype or next(iter(weights.dtypes.values())))
    names = {parameter: name for name, parameter in model.named_parameters()}
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied modules share one parameter
    for module in model.modules():
        for key, empty in list(module.named_parameters(recurse=False)):
            if empty not in made:
                made[empty] = _read_parameter(weights, names[empty], empty, context.tp, device)
            module.register_parameter(key, made[empty])
            if fp8_weights and isinstance(module, SplitLinear):
                keep_layer_in_fp8(module)
                made[empty] = module.weight
    return model.requires_grad_(not fp8_weights)


def _read_parameter(
    weights: Weights, name: str, empty: nn.Parameter, tp: Axis, device: str | torch.device
) -> nn.Parameter:
    """`empty`, on the meta device, with this tensor-parallel rank's values on `device`."""
    spec = empty.shard_spec
    if (stored := weights.shapes.get(name)) != spec.shape:
        raise ConfigError(
            f"{name} has shape {stored}, but the model needs {spec.shape}: set model.* as the weights were trained with"
        )
    local = torch.zeros(empty.shape)  # padding of the vocabulary is in no file
    for piece, at in pieces_of_local_range(spec, tp.rank, tp.size, 0, local.numel()):
        weights.fill(name, piece, local.view(-1)[at : at + piece.stop - piece.start])
    return mark(nn.Parameter(local.to(device, empty.dtype)), spec)
