"""Weights of the released layout, read by element ranges: safetensors, whole or by index; and pytorch_model.bin.

Memory holds what was asked for and no more. pytorch_model.bin is a pickle: torch's weights_only loader reads it, which
runs no code of the file.
"""

from __future__ import annotations

import math
import pickle
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from torch import Tensor

from megatron_tn.checkpoint.files import TensorFile
from megatron_tn.checkpoint.load import model_of
from megatron_tn.checkpoint.manifest import Piece
from megatron_tn.checkpoint.reshard import Rectangle, rectangles, view_of
from megatron_tn.config import ConfigError, ModelConfig, read_mapping
from megatron_tn.model.base import Model
from megatron_tn.model.registry import architecture, build_model
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.released.config import read_config, trained_length

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
OLD_WEIGHTS_FILE, OLD_INDEX_FILE = "pytorch_model.bin", "pytorch_model.bin.index.json"

TYPES = (torch.float32, torch.bfloat16, torch.float16)  # types that released weights may have


class SafetensorsFile:
    """shapes: tensor -> (type, shape). Raises ConfigError where the file is missing or damaged."""

    def __init__(self, path: Path):
        self._file = TensorFile(path)
        self.shapes = {name: (dtype, shape) for name, (dtype, shape, _) in self._file.entries.items()}

    def read(self, name: str, rectangle: Rectangle, destination: Tensor) -> None:
        """Fill `destination`, contiguous, with a rectangle of the tensor, seen as a matrix of shape[0] rows."""
        width = math.prod(self.shapes[name][1][1:])
        if rectangle.right - rectangle.left == width:
            self._file.read(name, rectangle.top * width, destination.view(-1))
            return
        for row, values in enumerate(destination, rectangle.top):
            self._file.read(name, row * width + rectangle.left, values)

    def close(self) -> None:
        self._file.close()


class PickleFile:
    """As `SafetensorsFile`, of a file that torch.save wrote; memory-mapped where it has today's zip format. Tensors in
    fp64 are read as fp32."""

    def __init__(self, path: Path):
        try:
            try:
                tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # the file format before torch 1.6 cannot be memory-mapped
                tensors = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise ConfigError(f"{path} is missing") from None
        except pickle.UnpicklingError as error:
            # Advice to load the file without this protection stands before and after what is wrong with it.
            why = str(error).rpartition("WeightsUnpickler error:")[2].partition("Check the documentation")[0]
            raise ConfigError(f"{path} is refused: {' '.join(why.split())}") from None
        except Exception as error:  # whatever a damaged pickle raises
            why = str(error).partition("\n")[0]
            raise ConfigError(f"{path} is damaged: {type(error).__name__}: {why}") from None
        if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
            raise ConfigError(f"{path} is damaged: it does not hold a mapping of names to tensors")
        self._tensors: dict[str, Tensor] = tensors
        self.shapes = {
            name: (torch.float32 if value.dtype == torch.float64 else value.dtype, tuple(value.shape))
            for name, value in tensors.items()
        }

    def read(self, name: str, rectangle: Rectangle, destination: Tensor) -> None:
        top, bottom, left, right = rectangle
        matrix = self._tensors[name].reshape(self._tensors[name].shape[0], -1)
        destination.copy_(matrix[top:bottom, left:right])

    def close(self) -> None:
        self._tensors.clear()


class ReleasedWeights:
    """`checkpoint.load.Weights` of a released folder. Use as a context manager. sequence_length: of training, where
    config.json has it.

    Raises:
        FileNotFoundError: no config.json, or no weights.
        ConfigError: a file is damaged; a tensor is missing, has another shape, or is there and unknown; a head that is
            stored differs from the embedding.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.config: ModelConfig = read_config(directory)
        self.sequence_length = trained_length(directory)
        specs = build_model(self.config, None, "meta").shard_specs()
        self.shapes: dict[str, tuple[int, ...]] = {name: spec.shape for name, spec in specs.items()}
        self._released = architecture(self.config).released
        self._tensors = {name: self._released.tensor(name) for name in self.shapes}
        self._stack = ExitStack()
        try:
            self._files = self._open()
            self._check()
        except BaseException:
            self._stack.close()
            raise
        self.dtypes = {name: self._stored(tensor)[0] for name, tensor in self._tensors.items()}

    def __enter__(self) -> ReleasedWeights:
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def fill(self, name: str, piece: Piece, destination: Tensor) -> None:
        """Fill `destination` [piece.stop - piece.start], contiguous, with that piece of the parameter `name`."""
        staging, tensor = destination, self._tensors[name]
        if destination.dtype != (stored := self._stored(tensor)[0]):
            staging = torch.empty(destination.shape, dtype=stored)
        for rectangle in rectangles(piece):
            self._files[tensor].read(tensor, rectangle, view_of(piece, staging, rectangle))
        if staging is not destination:
            destination.copy_(staging)

    def _stored(self, tensor: str) -> tuple[torch.dtype, tuple[int, ...]]:
        return self._files[tensor].shapes[tensor]

    def _open(self) -> dict[str, SafetensorsFile | PickleFile]:
        """Tensor -> the file that holds it."""
        found: dict[str, SafetensorsFile | PickleFile] = {}
        for path, names in weight_files(self.directory).items():
            file = self._stack.enter_context(closing((PickleFile if path.suffix == ".bin" else SafetensorsFile)(path)))
            for name in file.shapes if names is None else names:
                if name not in file.shapes:
                    raise ConfigError(f"{path} has no tensor {name}, which the index looks for in it")
                if name in found:  # without an index
                    raise ConfigError(f"{path} has tensor {name}, which another file without an index has, too")
                found[name] = file
        return found

    def _check(self) -> None:
        repeated = self._released.repeated
        shapes = {tensor: self.shapes[name] for name, tensor in self._tensors.items()}
        problems = []
        if missing := [name for name in shapes if name not in self._files]:
            problems.append(f"{self.directory}: tensor {_and_others(missing)} missing")
        if unknown := sorted(self._files.keys() - shapes.keys() - repeated.keys()):
            problems.append(f"{self.directory}: tensor {_and_others(unknown)} unknown")
        there = {name: shapes[repeated.get(name, name)] for name in self._files if name not in unknown}
        for name, wanted in there.items():
            dtype, shape = self._stored(name)
            if shape != wanted:
                problems.append(
                    f"{self.directory}: {name} has shape {list(shape)}, but config.json makes it {list(wanted)}"
                )
            if dtype not in TYPES:
                problems.append(f"{self.directory}: {name} has type {dtype}, not one of {', '.join(map(str, TYPES))}")
        if not problems:
            problems = [
                f"{self.directory}: {name} differs from {origin}, but this model has one weight for both"
                for name, origin in repeated.items()
                if name in self._files and not self._same(name, origin)
            ]
        if problems:
            raise ConfigError(problems)

    def _same(self, name: str, other: str) -> bool:
        """Whether two tensors of one shape are equal, by their first, middle and last rows."""
        rows, *inner = self._stored(other)[1]
        one, two = (torch.empty(math.prod(inner), dtype=self._stored(which)[0]) for which in (name, other))
        for row in {0, rows // 2, rows - 1}:
            rectangle = Rectangle(row, row + 1, 0, len(one))
            self._files[name].read(name, rectangle, one.view(1, -1))
            self._files[other].read(other, rectangle, two.view(1, -1))
            if not torch.equal(one, two.to(one.dtype)):
                return False
        return True


def _and_others(names: list[str]) -> str:
    """The subject and the verb of a line about some of a model's many tensors."""
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]}, and {len(names) - 1} more, are"


def weight_files(directory: Path) -> dict[Path, list[str] | None]:
    """The files that hold a released folder's weights -> the tensors that its index looks for in each; None: all.

    In the order in which transformers looks: a whole file, then an index, safetensors before pickles.
    """
    for whole, index in ((WEIGHTS_FILE, INDEX_FILE), (OLD_WEIGHTS_FILE, OLD_INDEX_FILE)):
        if (directory / whole).is_file():
            return {directory / whole: None}
        if (directory / index).is_file():
            return _indexed(directory / index)
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{directory} has no *.safetensors files and no {OLD_WEIGHTS_FILE}")
    return dict.fromkeys(files)


def _indexed(index: Path) -> dict[Path, list[str] | None]:
    weight_map = read_mapping(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ConfigError(f"{index} is damaged: it has no weight_map of tensors' names to files")
    files: dict[Path, list[str] | None] = {}
    for name, file in weight_map.items():
        if Path(file).name != file:
            raise ConfigError(f"{index}: {file!r} is not a plain file name in the model's directory")
        files.setdefault(index.parent / file, []).append(name)
    return files


def load_pretrained(
    directory: str | Path,
    context: ParallelContext | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    fp8_weights: bool = False,
) -> Model:
    """Build a model from a folder in the released layout.

    Each tensor-parallel rank of `context` reads its own parts. fp8_weights: see `model_of`.

    Raises:
        FileNotFoundError: no such folder, no config.json in it, or no weights.
        ConfigError: as `ReleasedWeights`, or the model does not fit the layout.
    """
    with ReleasedWeights(Path(directory)) as weights:
        return model_of(weights, context, device, dtype, fp8_weights=fp8_weights)
