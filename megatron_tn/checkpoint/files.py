"""Tensor files of a checkpoint, in the safetensors format.

The format is 8 bytes of header length (little-endian), a JSON header {name: {dtype, shape, data_offsets}}, and the
tensors' bytes; the safetensors library reads and writes the same files. Unlike that library, the writer hashes while it
writes, and the reader calls pread on exact byte ranges instead of mapping the file: a rank can count the bytes it
reads, and a truncated file raises an error that names it instead of a bus error.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_tn.config import ConfigError

DTYPES = {
    "F32": torch.float32,
    "U8": torch.uint8,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MOST_HEADER_BYTES = 100 << 20
CHUNK_BYTES = 16 << 20  # per write and hash update


@dataclass(frozen=True)
class FileRecord:
    """size: bytes. sha256: hex, of the whole file."""

    size: int
    sha256: str


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write contiguous CPU tensors to `path` and fsync it. The same tensors give the same bytes.

    Hashing and writing release the GIL.
    """
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return stream_tensors(path, shapes, tensors.values())


def stream_tensors(
    path: Path,
    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str] | None = None,
) -> FileRecord:
    """`write_tensors` of tensors that are made one at a time: those of `shapes`, name -> (type, shape), in its order.

    metadata: of the file, which every reader of safetensors shows.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape) in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors to 8 bytes
    digest, written = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        for part in itertools.chain([len(text).to_bytes(8, "little") + text], map(_bytes_of, tensors)):
            view = memoryview(part)
            for start in range(0, len(view), CHUNK_BYTES):
                chunk = view[start : start + CHUNK_BYTES]
                digest.update(chunk)
                written += len(chunk)
                while chunk:
                    chunk = chunk[file.write(chunk) :]
        os.fsync(file.fileno())
    return FileRecord(written, digest.hexdigest())


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")


class TensorFile:
    """An open tensor file. Reads exactly the requested bytes and counts them in `bytes_read`.

    Raises:
        ConfigError: the file is missing or damaged, or lacks the requested tensor.
    """

    def __init__(self, path: Path):
        self.path = path
        self.bytes_read = 0
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise ConfigError(f"{path} is missing") from None
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
        try:
            self.entries = self._read_header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        os.close(self._descriptor)

    def read(self, name: str, first: int, destination: Tensor) -> None:
        """Fill `destination` [n], contiguous and on the CPU, with elements [first, first + n) of tensor `name`."""
        dtype, shape, offset = self.entry(name)
        if dtype != destination.dtype or first + destination.numel() > math.prod(shape):
            raise ConfigError(
                f"{self.path} is damaged: {name} is {dtype} {list(shape)}, but {destination.dtype} elements "
                f"{first} to {first + destination.numel()} were requested"
            )
        self._fill(_bytes_of(destination), offset + first * destination.element_size())

    def get(self, name: str) -> Tensor:
        """All elements of tensor `name`, in the shape of the file's header."""
        dtype, shape, _ = self.entry(name)
        tensor = torch.empty(shape, dtype=dtype)
        self.read(name, 0, tensor.view(-1))
        return tensor

    def entry(self, name: str) -> tuple[torch.dtype, tuple[int, ...], int]:
        """(dtype, shape, offset of the first byte in the file) of tensor `name`."""
        if name not in self.entries:
            raise ConfigError(f"{self.path} is damaged: it has no tensor {name}")
        return self.entries[name]

    def _read_header(self) -> dict[str, tuple[torch.dtype, tuple[int, ...], int]]:
        size = os.fstat(self._descriptor).st_size
        length = int.from_bytes(self._head(8, 0), "little")
        if size < 8 or length > min(size - 8, MOST_HEADER_BYTES):
            raise ConfigError(f"{self.path} is damaged: a header of {length} bytes in a file of {size}")
        entries, end = {}, 8 + length
        try:
            header = json.loads(self._head(length, 8))
            header.pop("__metadata__", None)
            # Other writers may name tensors in another order than that of their bytes.
            for name, item in sorted(header.items(), key=lambda pair: pair[1]["data_offsets"]):
                dtype, shape = DTYPES[item["dtype"]], tuple(int(extent) for extent in item["shape"])
                start, stop = (int(edge) + 8 + length for edge in item["data_offsets"])
                if min(shape, default=0) < 0 or stop - start != math.prod(shape) * dtype.itemsize or start != end:
                    raise ConfigError(f"{self.path} is damaged: {name} does not follow the tensor before it")
                entries[name], end = (dtype, shape, start), stop
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{self.path} is damaged: its header: {type(error).__name__}: {error}") from None
        if end != size:
            raise ConfigError(f"{self.path} is damaged: its tensors end at byte {end}, the file at {size}")
        return entries

    def _head(self, count: int, at: int) -> bytes:
        data = bytearray(max(0, min(count, MOST_HEADER_BYTES)))
        self._fill(memoryview(data), at)
        return bytes(data)

    def _fill(self, view: memoryview, at: int) -> None:
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._descriptor, [view[done : done + CHUNK_BYTES]], at + done)
            except OSError as error:
                raise ConfigError(f"{self.path} cannot be read: {error.strerror}") from None
            if count == 0:
                raise ConfigError(f"{self.path} is damaged: it ends at byte {at + done}")
            done += count
        self.bytes_read += done


def sync_folder(path: Path) -> None:
    """fsync a folder: files created, renamed or removed in it stay so after a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
