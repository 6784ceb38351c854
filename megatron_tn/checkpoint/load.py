"""Load a checkpoint into any engine and layout: each rank reads the stored pieces that overlap its own ranges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from torch import Tensor

from megatron_tn.checkpoint.files import TensorFile
from megatron_tn.checkpoint.hf import ReleasedTensors, config_from_released
from megatron_tn.checkpoint.manifest import MANIFEST, CheckpointManifest, Piece, Trainable, rank_file
from megatron_tn.checkpoint.reshard import overlaps, pieces_of_local_range, spans_of, view_of
from megatron_tn.checkpoint.retention import reading
from megatron_tn.config import ConfigError, ModelConfig, from_mapping, read_mapping
from megatron_tn.model.base import Model
from megatron_tn.model.registry import build_model
from megatron_tn.parallel.context import ParallelContext


class Reader:
    """Open files of one checkpoint, locked against removal by a run's retention. Use as a context manager.

    `bytes_read`: bytes read from all files.

    Raises:
        ConfigError: a file is missing or damaged, a tensor is incomplete or of another shape.
    """

    def __init__(self, directory: Path, manifest: CheckpointManifest):
        self.directory = directory
        self.manifest = manifest
        self._files: dict[str, TensorFile] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Reader:
        self._stack.enter_context(reading(self.directory))
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def fill(self, kind: str, name: str, shape: tuple[int, ...], piece: Piece, destination: Tensor) -> None:
        """Fill `destination` [piece.stop - piece.start], contiguous, with `piece` of logical tensor kind/name."""
        stored_shape = self.manifest.shapes.get(name)
        if stored_shape != list(shape):
            raise ConfigError(f"{self.directory}: {name} has shape {stored_shape}, but the model needs {list(shape)}")
        staging = torch.empty(destination.shape, dtype=torch.float32)
        filled = 0
        for stored in self.manifest.pieces.get(f"{kind}/{name}", []):
            for rectangle in overlaps(stored, piece):
                for part, first, last in spans_of(stored, rectangle):
                    target = view_of(piece, staging, part)
                    if target.is_contiguous() and target.numel() == last - first:
                        self._open(stored.file).read(stored.key, first, target.view(-1))
                    else:
                        values = torch.empty(last - first)
                        self._open(stored.file).read(stored.key, first, values)
                        target.copy_(view_of(stored, values, part, first))
                    filled += target.numel()
        if filled != piece.stop - piece.start:
            missing = piece.stop - piece.start - filled
            raise ConfigError(f"{self.directory}: {missing} elements of {kind}/{name} are in none of its files")
        with torch.no_grad():
            destination.copy_(staging)

    def rng(self, rank: int) -> dict[str, Tensor]:
        stored = self._open(rank_file(rank))
        return {key: stored.get(key) for key in stored.entries if key.startswith("rng/")}

    @property
    def bytes_read(self) -> int:
        return sum(file.bytes_read for file in self._files.values())

    def _open(self, name: str) -> TensorFile:
        if name not in self._files:
            self._files[name] = self._stack.enter_context(closing(TensorFile(self.directory / name)))
        return self._files[name]


def load_checkpoint(engine: Trainable, directory: Path) -> CheckpointManifest:
    """Restore masters, optimizer state and step and, at the same world size, RNG states. Returns the manifest.

    Raises:
        ConfigError: the checkpoint is damaged, or of another model or optimizer.
    """
    manifest = CheckpointManifest.read(directory)
    if set(manifest.state_kinds) != set(engine.state_kinds):
        raise ConfigError(
            f"{directory} holds {', '.join(manifest.state_kinds)} of each parameter, but this run's optimizer keeps "
            f"{', '.join(engine.state_kinds)}: resume with the optimizer that saved the checkpoint"
        )
    context = engine.context
    with Reader(directory, manifest) as reader:
        _fill(engine, reader, manifest.kinds)
        if math.prod(manifest.layout.values()) == context.world_size:
            rng = reader.rng(context.rank)
            torch.set_rng_state(rng["rng/cpu"])
            if torch.cuda.is_available() and "rng/cuda" in rng:
                torch.cuda.set_rng_state(rng["rng/cuda"])
    engine.refresh(manifest.optimizer_step)
    return manifest


def load_weights(engine: Trainable, directory: Path) -> None:
    """Fill the masters with the weights in a checkpoint or a released model's folder, of the same shapes; the optimizer
    begins afresh.

    Raises:
        ConfigError: a file is missing or damaged, or a tensor has another shape.
    """
    if (directory / MANIFEST).is_file():
        with Reader(directory, CheckpointManifest.read(directory)) as reader:
            _fill(engine, reader, ["param"])
    else:
        _fill(engine, ReleasedTensors(directory), ["param"])
    engine.refresh(optimizer_step=0)


def _fill(engine: Trainable, reader: Reader | ReleasedTensors, kinds: Sequence[str]) -> None:
    """These kinds of values of each element that the rank owns; zero in all other kinds and in padding."""
    axis, specs = engine.context.tp, engine.model.shard_specs()
    for owned in engine.owned_ranges():
        spec = specs[owned.name]
        for values in owned.values.values():
            values.zero_()  # padding is in no file, and memory that nobody wrote may hold NaN
        for piece, at in pieces_of_local_range(spec, axis.rank, axis.size, owned.start, owned.stop):
            for kind in kinds:
                destination = owned.values[kind][at : at + piece.stop - piece.start]
                reader.fill(kind, owned.name, spec.shape, piece, destination)


def stored_model_config(directory: Path) -> ModelConfig:
    """Of the model in a checkpoint or a released model's folder. Raises ConfigError when it is damaged."""
    if (directory / MANIFEST).is_file():
        # A setting that is newer than the checkpoint had its default there.
        return from_mapping(ModelConfig, CheckpointManifest.read(directory).config["model"])
    return config_from_released(read_mapping(directory / "config.json"))


def load_model(
    directory: Path,
    context: ParallelContext | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Model:
    """The model without an engine or optimizer state. dtype None: the precision of training."""
    manifest = CheckpointManifest.read(directory)
    config = from_mapping(ModelConfig, manifest.config["model"])
    context = context or ParallelContext()
    trained = torch.bfloat16 if manifest.config["engine"]["precision"] == "bf16" else torch.float32
    model = build_model(config, context, device, dtype or trained)
    with Reader(directory, manifest) as reader:
        for name, parameter in model.named_parameters():
            spec = parameter.shard_spec
            local = torch.zeros(parameter.shape)
            # Masters are rounded to the training precision first: training computed with rounded weights.
            for piece, at in pieces_of_local_range(spec, context.tp.rank, context.tp.size, 0, local.numel()):
                reader.fill("param", name, spec.shape, piece, local.view(-1)[at : at + piece.stop - piece.start])
            with torch.no_grad():
                parameter.copy_(local.to(trained))
    return model
