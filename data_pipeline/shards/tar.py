"""Tar archives of small files, as webdataset's TarWriter writes them, but without importing torch."""

import tarfile
from typing import BinaryIO


class TarWriter:
    """Appends files to `file` in ustar format; the bytes depend only on names and contents."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._size = 0

    def write(self, name: str, data: bytes) -> None:
        """Appends a member with mode 0444, without owner and date."""
        member = tarfile.TarInfo(name)
        member.size, member.mode = len(data), 0o444
        padding = -len(data) % tarfile.BLOCKSIZE
        self._put(member.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape") + data + bytes(padding))

    def finish(self) -> None:
        """Appends the two empty blocks that end an archive, and padding to a whole record."""
        self._put(bytes(2 * tarfile.BLOCKSIZE))
        self._put(bytes(-self._size % tarfile.RECORDSIZE))

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._size += len(data)
