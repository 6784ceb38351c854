"""Write a released folder: weights in shards, config.json, the modelling file, and what the caller adds.

Tensors are written one at a time, so memory holds the largest of them and not the model. New files are written to a
folder of their own inside the target; when all are there, the old export's files are removed and the new ones moved.
"""

import contextlib
import fcntl
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_tn.checkpoint.files import stream_tensors, sync_folder
from megatron_tn.checkpoint.load import Weights
from megatron_tn.checkpoint.manifest import Piece
from megatron_tn.config import ConfigError, ModelConfig
from megatron_tn.model.base import Model
from megatron_tn.model.registry import architecture, problems_of_export
from megatron_tn.parallel.context import Axis
from megatron_tn.parallel.fp8_weights import keeps_fp8
from megatron_tn.parallel.world import first_for_all
from megatron_tn.released.config import CONFIG_FILE, config_to_released
from megatron_tn.released.weights import INDEX_FILE, WEIGHTS_FILE

SHARD_BYTES = 4 << 30  # bytes of one weight file, unless one tensor alone is larger
STAGING = ".export-"  # prefix of the folder's name that holds new files until all are written
# model_type -> the modelling file of its exports; transformers has that of all others.
MODELLING = {"transnormer": Path(__file__).with_name("modeling_transnormer.py")}
# What an export consists of, here or written by transformers: no such file of an older export stays beside a new one.
EXPORT_FILES = (
    CONFIG_FILE,
    "generation_config.json",
    "README.md",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model-*.bin",
    "pytorch_model.bin.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "modeling_*.py",
    "configuration_*.py",
)


def problems_of_output(directory: Path) -> list[str]:
    """Reasons why no export can be written to `directory`: it must be absent, empty, or hold an export of this package,
    also one that a kill left half replaced. Another's model is never replaced: its weights may be the only copy."""
    if directory.exists() and not directory.is_dir():
        return [f"output={directory} is a file: name a folder to write the model to"]
    if not directory.is_dir() or all(path.name.startswith(".") for path in directory.iterdir()):
        return []
    if any(directory.glob(f"{STAGING}*")):
        return []
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        if "megatron_tn" in json.loads((directory / CONFIG_FILE).read_text()):  # all exports have this field
            return []
    return [f"output={directory} holds files that are no export of megatron_tn: name a new folder for the model"]


@contextlib.contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """No other export or import writes to `directory` until the block ends, on file systems that lock folders.

    Raises:
        ConfigError: one is being written.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"output={directory} is being written by another process") from None
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


def write_released(
    directory: Path,
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    tensor: Callable[[str], Tensor],
    *,
    shard_bytes: int = SHARD_BYTES,
    texts: Mapping[str, str] | None = None,
    sequence_length: int | None = None,
) -> None:
    """Write the model in the released layout to `directory`; an export that is there is replaced.

    tensor(name): the whole tensor of that parameter, on the CPU, contiguous, of shapes[name] and dtypes[name]; called
        once for each, in the order of `shapes`. texts: further files, name -> content. sequence_length: of training,
        where it is known.

    Raises:
        ConfigError: the released layout cannot say this model, or `directory` holds files that are no export, or
            another export is being written to it.
    """
    if problems := problems_of_export(config) + problems_of_output(directory):
        raise ConfigError(problems)
    directory.mkdir(parents=True, exist_ok=True)
    released = architecture(config).released
    main_dtype = dtypes[next(iter(shapes))]
    ids = {f"{name}_token_id": getattr(config, f"{name}_id") for name in ("bos", "eos", "pad")}
    settings = config_to_released(config, sequence_length) | {"dtype": str(main_dtype).removeprefix("torch.")}
    modelling = MODELLING.get(released.model_type)
    contents = {
        "generation_config.json": _json(ids),
        **({} if modelling is None else {modelling.name: modelling.read_text()}),
        **(texts or {}),
        CONFIG_FILE: _json(settings),
    }
    with alone_in(directory):
        staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=directory))
        try:
            for leftover in set(directory.glob(f"{STAGING}*")) - {staging}:  # left by an export that was killed
                shutil.rmtree(leftover)
            _write_weights(staging, shapes, dtypes, tensor, shard_bytes, released.tensor)
            for name, content in contents.items():
                (staging / name).write_text(content)
            _publish(staging, directory)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def save_pretrained(model: Model, directory: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write `model` in the released layout; global rank 0 writes. Collective over tensor parallelism.

    Raises:
        ConfigError: the weights are kept in fp8; or on rank 0 and its tensor-parallel ranks, as `write_released`.
        OSError: on those ranks, where rank 0 could not write.
    """
    if keeps_fp8(model):
        raise ConfigError("fp8_weights=true is for decoding and evaluation: no released layout holds weights in fp8")
    axis, is_first = model.context.tp, model.context.is_first

    def check() -> None:
        if is_first and (problems := problems_of_export(model.config) + problems_of_output(Path(directory))):
            raise ConfigError(problems)

    # Rank 0 alone looks at the folder; the others would wait in `gathered` for a rank 0 that has raised.
    _first_of(axis, check)
    parameters = dict(model.named_parameters())
    shapes = {name: parameter.shard_spec.shape for name, parameter in parameters.items()}
    dtypes = {name: dtype or parameter.dtype for name, parameter in parameters.items()}
    left = list(shapes)  # to be gathered, on every rank in this order, even if rank 0 fails to write

    def gathered(name: str) -> Tensor:
        left.remove(name)
        whole = parameters[name].shard_spec.gather(parameters[name].detach(), axis)
        return whole.to(device="cpu", dtype=dtypes[name]).contiguous()

    failures = []
    if is_first:
        try:
            write_released(Path(directory), model.config, shapes, dtypes, gathered)
        except Exception as error:
            failures.append(error)
    for name in list(left):
        gathered(name)

    def failed() -> None:
        for error in failures:
            raise error

    _first_of(axis, failed)


def _first_of(axis: Axis, act: Callable[[], None]) -> None:
    """What `act()` raises on the first rank of `axis`, on all its ranks."""
    act() if axis.group is None else first_for_all(act, axis.group)


def whole_tensor(weights: Weights, name: str, dtype: torch.dtype) -> Tensor:
    shape = weights.shapes[name]
    values = torch.empty(shape, dtype=weights.dtypes[name])
    box = tuple((0, length) for length in shape)
    weights.fill(name, Piece(box, 0, values.numel()), values.view(-1))
    return values.to(dtype)


def shards(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype], most: int) -> list[list[str]]:
    """Tensors of each weight file, of at most `most` bytes, in the order of `shapes`."""
    files: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        more = math.prod(shape) * dtypes[name].itemsize
        if files[-1] and size + more > most:
            files.append([])
            size = 0
        files[-1].append(name)
        size += more
    return files


def _write_weights(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    tensor: Callable[[str], Tensor],
    shard_bytes: int,
    released_name: Callable[[str], str],
) -> None:
    files = shards(shapes, dtypes, shard_bytes)
    weight_map = {}
    for number, names in enumerate(files, 1):
        file = WEIGHTS_FILE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        entries = {released_name(name): (dtypes[name], shapes[name]) for name in names}
        stream_tensors(folder / file, entries, map(tensor, names), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(entries, file)
    if len(files) > 1:
        size = sum(math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(_json(index))


def _publish(staging: Path, directory: Path) -> None:
    """Move the new files to `directory` in the place of the old export's. config.json is the first file that goes and
    the last that comes: a folder that a kill leaves between the two is no model."""
    old = {path for pattern in EXPORT_FILES for path in directory.glob(pattern) if path.is_file() or path.is_symlink()}
    for path in sorted(old, key=lambda path: path.name != CONFIG_FILE):
        path.unlink()
    mode = (staging / CONFIG_FILE).stat().st_mode  # the umask's mode: safetensors writes its files with another mode
    for path in sorted(staging.iterdir(), key=lambda path: path.name == CONFIG_FILE):
        path.chmod(mode)
        path.rename(directory / path.name)
    sync_folder(directory)


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=1) + "\n"
