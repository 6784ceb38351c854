"""Tensor files of a checkpoint, in the safetensors format.

The format is 8 bytes of header length (little-endian), a JSON header {name: {dtype, shape, data_offsets}}, and the
tensors' bytes; the safetensors library reads and writes the same files. Unlike that library, the writer hashes while it
writes, and the reader calls pread on exact byte ranges instead of mapping the file: a rank can count the bytes it
reads, and a truncated file raises an error that names it instead of a bus error. Both use direct I/O; for that, spaces
at the end of the header let the tensors begin at a multiple of 4096 bytes.
"""

import itertools
import json
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_tn.checkpoint.direct import ALIGNMENT, DirectFile, buffer_of_this_thread, round_up
from megatron_tn.checkpoint.parts import FileRecord, write_file
from megatron_tn.config import ConfigError, regular

DTYPES = {
    "F32": torch.float32,
    "U8": torch.uint8,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MOST_HEADER_BYTES = 100 << 20
CHUNK_BYTES = 8 << 20  # per read
PART_BYTES = 8 << 20  # a part: one thread hashes and writes it; 32 MiB of parts in flight are faster than 64
COPIED_PART_BYTES = 1 << 20  # a part that is copied first; several copies are in memory at a time
WORTH_DIRECT = 1 << 20  # bytes: smaller reads go through the page cache, which reads ahead


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write contiguous tensors to `path` and fsync it. The same tensors give the same bytes, also from a GPU, of which
    host memory holds some parts at a time."""
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    head, parts = _header(shapes, None), itertools.chain.from_iterable(map(_on_host, joined(tensors.values())))
    return write_file(path, itertools.chain([head], map(_bytes_of, parts)), PART_BYTES)


def stream_tensors(
    path: Path,
    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str] | None = None,
) -> FileRecord:
    """`write_tensors` of tensors that are made one at a time: those of `shapes`, name -> (type, shape), in its order.

    metadata: of the file, which every reader of safetensors shows.
    """
    return write_file(path, itertools.chain([_header(shapes, metadata)], map(_bytes_of, tensors)), COPIED_PART_BYTES)


def _header(
    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None
) -> np.ndarray:
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape) in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8)


def joined(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Adjacent tensors of one storage are merged into one [n], so that a part of the file seldom spans several
    tensors."""
    run: Tensor | None = None
    for tensor in tensors:
        flat = tensor.view(-1)
        if (
            run is not None
            and flat.dtype == run.dtype
            and flat.untyped_storage().data_ptr() == run.untyped_storage().data_ptr()
            and flat.storage_offset() == run.storage_offset() + run.numel()
        ):
            run = run.as_strided((run.numel() + flat.numel(),), (1,))
            continue
        if run is not None:
            yield run
        run = flat
    if run is not None:
        yield run


def _on_host(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor [n] itself if it is on the host; else copies of its parts, one at a time."""
    if tensor.is_cpu:
        yield tensor
    else:
        yield from (part.cpu() for part in tensor.split(PART_BYTES // tensor.element_size()))


def _bytes_of(tensor: Tensor) -> np.ndarray:
    return tensor.view(-1).view(torch.uint8).numpy()


class TensorFile:
    """An open tensor file. Reads exactly the requested bytes and counts them in `bytes_read`.

    direct: whether large reads are direct I/O: for a file that is read once, on a disk that is faster than the page
    cache. content: what is in memory of the file already, and is not read from the disk: (first byte, uint8 [n]) each,
    in the order of the file.
    `read` and `get` may be called by several threads.

    Raises:
        ConfigError: the file is missing or damaged, or lacks the requested tensor.
    """

    def __init__(self, path: Path, *, direct: bool = False, content: Sequence[tuple[int, np.ndarray]] = ()):
        self.path = path
        self._content = content
        self.bytes_read = 0
        self._lock = threading.Lock()
        self._direct: DirectFile | None = None
        try:
            self._descriptor = os.open(regular(path), os.O_RDONLY)
        except FileNotFoundError:
            raise ConfigError(f"{path} is missing") from None
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
        try:
            self.entries = self._read_header()
            self._direct = DirectFile(path, os.O_RDONLY) if direct else None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        os.close(self._descriptor)
        if self._direct is not None:
            self._direct.close()

    def read(self, name: str, first: int, destination: Tensor) -> None:
        """Fill `destination` [n], contiguous and on any device, with elements [first, first + n) of tensor `name`."""
        at = self._place(name, first, destination.numel(), destination.dtype)
        target = destination.view(-1).view(torch.uint8)
        if (held := self._in_memory(at, len(target))) is not None:
            target.copy_(torch.from_numpy(held))
            return
        if target.is_cpu and (self._direct is None or len(target) < WORTH_DIRECT):
            self._fill(target.numpy(), at)
            return
        for start in range(0, len(target), CHUNK_BYTES):
            part = target[start : start + CHUNK_BYTES]
            data = self._buffered(at + start, len(part))
            if part.is_cpu:
                np.copyto(part.numpy(), data)
            else:
                part.copy_(torch.from_numpy(data))

    def read_rows(self, name: str, first: int, pitch: int, destination: Tensor) -> None:
        """Fill `destination` [rows, columns], contiguous on the host, with rows of tensor `name` that begin at elements
        first, first + pitch, ... The kernel is told of all of them before the first one is read: it then reads from the
        disk as for one large range, once for the ranks that each take other columns of the same rows."""
        count = (len(destination) - 1) * pitch + destination.shape[1]
        at, step = self._place(name, first, count, destination.dtype), pitch * destination.element_size()
        rows = destination.view(torch.uint8).numpy()
        if hasattr(os, "posix_fadvise"):  # Linux
            os.posix_fadvise(self._descriptor, at, len(rows) * step, os.POSIX_FADV_WILLNEED)
        for number, row in enumerate(rows):
            self._fill(row, at + number * step)

    def view(self, name: str, first: int, count: int) -> Tensor | None:
        """Elements [first, first + count) of the fp32 tensor `name`, to be read only, where they are in memory."""
        at = self._place(name, first, count, torch.float32)
        if (found := self._in_memory(at, count * torch.float32.itemsize)) is None:
            return None
        # Older files have no spaces that align their tensors.
        return torch.from_numpy(found if at % torch.float32.itemsize == 0 else found.copy()).view(torch.float32)

    def _in_memory(self, at: int, count: int) -> np.ndarray | None:
        """Bytes [at, at + count) where all are in memory; a copy where they are not in one piece."""
        found, end = [], at
        for first, data in self._content:
            if first <= end < min(first + len(data), at + count):
                found.append(data[end - first : at + count - first])
                end += len(found[-1])
        if not found or end < at + count:
            return None
        return found[0] if len(found) == 1 else np.concatenate(found)

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

    def _place(self, name: str, first: int, count: int, dtype: torch.dtype) -> int:
        """The byte of the file at which elements [first, first + count) of tensor `name` begin."""
        stored, shape, offset = self.entry(name)
        if stored != dtype or first + count > math.prod(shape):
            raise ConfigError(
                f"{self.path} is damaged: {name} is {stored} {list(shape)}, but {dtype} elements "
                f"{first} to {first + count} were requested"
            )
        return offset + first * dtype.itemsize

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
                if item["dtype"] not in DTYPES:
                    raise ConfigError(f"{self.path}: {name} has type {item['dtype']}, not one of {', '.join(DTYPES)}")
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
        data = np.empty(max(0, min(count, MOST_HEADER_BYTES)), np.uint8)
        self._fill(data, at)
        return data.tobytes()

    def _buffered(self, at: int, count: int) -> np.ndarray:
        """Bytes [at, at + count) of the file, in this thread's buffer: valid until the thread's next call."""
        skip = at % ALIGNMENT
        buffer = buffer_of_this_thread(CHUNK_BYTES + 2 * ALIGNMENT)
        data = buffer[skip : skip + count]
        if self._direct is None or count < WORTH_DIRECT:
            self._fill(data, at)
            return data
        try:
            found = self._direct.read(buffer[: round_up(skip + count)], at - skip)
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be read: {error.strerror}") from None
        if found < skip + count:
            raise ConfigError(f"{self.path} is damaged: it ends at byte {at - skip + found}")
        self._count(count)
        return data

    def _fill(self, view: np.ndarray, at: int) -> None:
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._descriptor, [view[done : done + CHUNK_BYTES]], at + done)
            except OSError as error:
                raise ConfigError(f"{self.path} cannot be read: {error.strerror}") from None
            if count == 0:
                raise ConfigError(f"{self.path} is damaged: it ends at byte {at + done}")
            done += count
        self._count(done)

    def _count(self, read: int) -> None:
        with self._lock:
            self.bytes_read += read


def sync_folder(path: Path) -> None:
    """fsync a folder: files created, renamed or removed in it stay so after a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
