"""Decompressed bytes of a WARC file: plain, in gzip members, or in zstd frames."""

import re
import zlib
from typing import BinaryIO

from data_pipeline.readers.base import Bomb, Frames, zstd_frame
from data_pipeline.sources import Source

PIECE = 1 << 16  # bytes per read and per decompression step
GZIP, ZSTD = b"\x1f\x8b", (b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18", b"\x5d\x2a\x4d\x18")
MEMBER = re.compile(rb"\x1f\x8b\x08")
TRIED = 4096  # compressed bytes decompressed to check that a member begins with a record


class DamagedMember(EOFError):
    """A gzip member that cannot be decompressed to its end. `start`: its offset in the file."""

    def __init__(self, start: int, reason: str):
        super().__init__(f"gzip member at byte {start}: {reason}")
        self.start = start


class Members:
    """Reads the raw `file` and decompresses it.

    `start`: offset of the current gzip member in the file; `given`: bytes decompressed so far; `passed`: bytes returned
    so far. Raises Bomb when the decompressed bytes exceed both `source.max_expansion` * `size` and
    `source.max_document_bytes`, and DamagedMember, after which `next_member` continues.
    """

    def __init__(self, file: BinaryIO, size: int, source: Source):
        self._file = file
        self._most = max(size * source.max_expansion, source.max_document_bytes)
        self._bounds = f"max_expansion={source.max_expansion}, max_document_bytes={source.max_document_bytes}"
        head = file.read(4)
        file.seek(0)
        self.packed = head.startswith(GZIP)
        self._frames = Frames(file, zstd_frame) if head in ZSTD else None
        self._member = None  # zlib decompressor of the current member
        self._input = b""  # compressed bytes read but not yet decompressed
        self.given = 0  # bytes decompressed
        self._ready = b""
        self._at = 0  # offset in `_ready`
        self.start = 0
        self.passed = 0
        if not (self.packed or self._frames or b"W" in head):  # a file that begins with damage
            self.start = -1
            self.packed = self.next_member()
            if not self.packed:
                self.start = 0
                file.seek(0)

    def line(self, most: int) -> bytes:
        """Bytes up to and including the next line feed, at most `most`; without a line feed at the end of the file."""
        while (end := self._ready.find(b"\n", self._at, self._at + most)) < 0:
            if len(self._ready) - self._at >= most or not self._fill():
                return self._take(most)
        return self._take(end + 1 - self._at)

    def read(self, most: int) -> bytes:
        """1 to `most` bytes; b"" at the end of the file."""
        if self._at == len(self._ready):
            self._fill()
        return self._take(most)

    def push(self, data: bytes) -> None:
        """Puts `data` back, to be read next."""
        self._ready, self._at = data + self._ready[self._at :], 0
        self.passed -= len(data)

    def next_member(self) -> bool:
        """Seeks the next gzip member after `start` that begins with a WARC record. Returns whether there is one."""
        at, window = self.start + 1, b""
        self._file.seek(at)
        while True:
            more = self._file.read(PIECE)
            window += more
            for found in MEMBER.finditer(window):
                if more and found.start() > len(window) - TRIED:
                    break  # tried in the next window, with more bytes after it
                if _begins_record(window[found.start() : found.start() + TRIED]):
                    self.start = at + found.start()
                    self._file.seek(self.start)
                    self._member, self._input, self._ready, self._at = None, b"", b"", 0
                    return True
            if not more:
                return False
            kept = min(len(window), TRIED)
            at += len(window) - kept
            window = window[len(window) - kept :]

    def _take(self, most: int) -> bytes:
        data = self._ready[self._at : self._at + most]
        self._at += len(data)
        self.passed += len(data)
        return data

    def _fill(self) -> bool:
        """Appends decompressed bytes to `_ready`; False at the end of the file."""
        if self._frames:
            data = bytes(self._frames.read1(PIECE))
        else:
            data = self._inflate() if self.packed else self._file.read(PIECE)
        self.given += len(data)
        if (self.packed or self._frames) and self.given > self._most:
            raise Bomb(f"expands beyond {self._bounds}")
        self._ready, self._at = self._ready[self._at :] + data, 0
        return bool(data)

    def _inflate(self) -> bytes:
        """The next bytes of the gzip members; empty at the end of the file."""
        while True:
            if not self._input:
                self._input = self._file.read(PIECE)
            if self._member is None:
                self._input = self._input.lstrip(b"\0")  # padding
                if not self._input:
                    if more := self._file.read(PIECE):
                        self._input = more
                        continue
                    return b""
                self.start = self._file.tell() - len(self._input)
                self._member = zlib.decompressobj(31)
            elif not self._input and not self._member.unconsumed_tail:
                raise DamagedMember(self.start, "the file ends inside it")
            try:
                data = self._member.decompress(self._input, PIECE)
            except zlib.error as error:
                raise DamagedMember(self.start, str(error)) from None
            if self._member.eof:
                self._input, self._member = self._member.unused_data, None
            else:
                self._input = self._member.unconsumed_tail
            if data:
                return data


def _begins_record(packed: bytes) -> bool:
    try:
        return zlib.decompressobj(31).decompress(packed, 64).lstrip().startswith(b"WARC/")
    except zlib.error:
        return False
