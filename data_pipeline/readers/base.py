"""Types shared by all readers: documents, quarantined records, files; decompression."""

import io
import lzma
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from zstandard import ZstdDecompressor, ZstdError

from data_pipeline.errors import InputError
from data_pipeline.sources import Source

BUFFER = 1 << 17  # bytes per read from a decompressor
MOST_WINDOW = 128 << 20  # bytes of earlier output that a decompressor keeps; a frame that needs more is refused
# Errors of damaged files, in addition to the OSError without errno of gzip and fastwarc.
DAMAGED = (EOFError, zlib.error, ZstdError, lzma.LZMAError, zipfile.BadZipFile)
# Errors of parsers on unexpected content.
UNEXPECTED = (ValueError, LookupError, ArithmeticError, RecursionError, RuntimeError)


class Bomb(EOFError):
    """A compressed file that expands beyond its source's limits."""


@dataclass(frozen=True)
class Found:
    """A document. `place`: position in its file, empty for a whole file; `extra`: metadata other than source and
    language."""

    place: str
    text: str
    extra: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Quarantined:
    """A record without a document: `place` in the file, `reason` (a fixed word for counting), `detail` (a message), and
    its size in bytes where known."""

    place: str
    reason: str
    detail: str
    bytes: int = 0


@dataclass(frozen=True)
class File:
    """`id`: source name and path within the source; `open()`: its bytes, decompressed unless its reader decompresses
    itself; `size`: bytes on disk."""

    id: str
    open: Callable[[], BinaryIO]
    size: int


Items = Iterator[Found | Quarantined]


def too_large(place: str, size: int, source: Source) -> Quarantined:
    detail = f"{size} bytes or more, max_document_bytes={source.max_document_bytes}"
    return Quarantined(place, "too_large", detail, size)


def too_slow(place: str, what: str, source: Source, size: int = 0) -> Quarantined:
    return Quarantined(place, "too_slow", f"{what} take more than max_seconds={source.max_seconds} of CPU time", size)


def guarded(items: Items) -> Items:
    """The items of a file; at damage, a Quarantined with the reason ends them, and the items before it stay.

    Disk and network errors are raised and fail the stage, which can be run again: a broken connection must not truncate
    a file silently.
    """
    try:
        yield from items
    except Bomb as error:
        yield Quarantined("", "bomb", str(error))
    except InputError:
        raise
    except UNEXPECTED as error:
        yield Quarantined("", "reader_error", f"{type(error).__name__}: {error}")
    except (*DAMAGED, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, PermissionError):
            raise
        yield Quarantined("", "unreadable", f"{type(error).__name__}: {error}")


def printable(path: str) -> str:
    """A path as valid UTF-8 text: invalid bytes of a file name are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def opener(folder, path: str, source: Source, compression: str | None) -> Callable[[], BinaryIO]:
    """A function that opens a file of a datatrove folder, decompressed by its suffix unless `compression` is None."""
    if compression is None:
        return lambda: folder.open(path, "rb")

    def open_packed() -> BinaryIO:
        if path.endswith(".zip"):
            raise zipfile.BadZipFile("an archive of files, of which only the first would be read: unpack it")
        most = max(folder.size(path) * source.max_expansion, source.max_document_bytes)
        if suffix := next((suffix for suffix in FRAMES if path.endswith(suffix)), None):
            packed = Frames(folder.open(path, "rb"), FRAMES[suffix])
        else:
            packed = folder.open(path, "rb", compression=compression)
        return io.BufferedReader(_AsItComes(packed, most, source), BUFFER)

    return open_packed


class Frames:
    """The decompressed frames of a .zst or .xz file. Raises EOFError where the file ends within a frame, which the
    libraries' own readers of .zst take for the end of the data. `start`: makes a frame's decompressor."""

    PIECE = 1024  # compressed bytes per step: at most 32 MiB of output (zstd: 128 KiB per 4 bytes)

    def __init__(self, file: BinaryIO, start: Callable):
        self._file = file
        self._start = start
        self._frame = None  # decompressor of the unfinished frame
        self._packed = b""
        self._ready = memoryview(b"")

    def read1(self, size: int) -> memoryview:
        while not self._ready:
            self._packed = self._packed or self._file.read(self.PIECE)
            if not self._packed:
                if self._frame:
                    raise EOFError("the file ends inside a frame")
                break
            if self._frame is None and self._start is xz_frame:
                self._packed = self._packed.lstrip(b"\0")  # padding
                if not self._packed:
                    continue
            self._frame = self._frame or self._start()
            self._ready = memoryview(self._frame.decompress(self._packed))
            self._packed = b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        data, self._ready = self._ready[:size], self._ready[size:]
        return data

    def close(self) -> None:
        self._file.close()


def zstd_frame():
    return ZstdDecompressor(max_window_size=MOST_WINDOW).decompressobj()


def xz_frame() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(memlimit=MOST_WINDOW + (2 << 20))  # 2 MiB for tables


FRAMES = {".zst": zstd_frame, ".xz": xz_frame, ".lzma": xz_frame}  # by a file's suffix


class _AsItComes(io.RawIOBase):
    """Returns decompressed bytes as soon as there are any, so that bytes before a damaged place are not lost in a
    partly filled buffer. Raises Bomb after `most` bytes."""

    def __init__(self, file: BinaryIO, most: int, source: Source):
        self._file = file
        self._left = most
        self._bounds = f"max_expansion={source.max_expansion}, max_document_bytes={source.max_document_bytes}"

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self._file.read1(len(buffer)) if hasattr(self._file, "read1") else self._file.read(len(buffer))
        buffer[: len(data)] = data
        self._left -= len(data)
        if self._left < 0:
            raise Bomb(f"expands beyond {self._bounds}")
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()
