"""Direct I/O (O_DIRECT): between a buffer and the disk without the kernel's page cache, which is slower than the disk.

Direct I/O takes buffers, offsets and lengths that are multiples of the disk's block. Where a file system refuses it,
the same calls go through the page cache.
"""

import errno
import fcntl
import functools
import logging
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

log = logging.getLogger(__name__)

ALIGNMENT = 4096  # bytes: a multiple of every common disk's block
DIRECT = getattr(os, "O_DIRECT", 0)
REFUSED = (errno.EINVAL, errno.EOPNOTSUPP)

_threads_own = threading.local()


def aligned_buffer(size: int) -> np.ndarray:
    """uint8 [size] that begins at a page boundary."""
    return np.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)


def buffer_of_this_thread(size: int) -> np.ndarray:
    """`aligned_buffer` of at least `size` bytes that this thread keeps and reuses."""
    buffer = getattr(_threads_own, "buffer", None)
    if buffer is None or len(buffer) < size:
        buffer = _threads_own.buffer = aligned_buffer(size)
    return buffer


def is_aligned(array: np.ndarray) -> bool:
    return array.ctypes.data % ALIGNMENT == 0


def round_up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class DirectFile:
    """A file for `write` and `read` at aligned offsets from several threads.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, flags: int):
        self.path = path
        self.is_direct = True
        try:
            self.descriptor = os.open(path, flags | DIRECT, 0o666)
        except OSError as error:
            if error.errno not in REFUSED:
                raise
            self.descriptor = os.open(path, flags, 0o666)
            self._go_through_the_cache()

    def close(self) -> None:
        os.close(self.descriptor)

    def write(self, data: np.ndarray, at: int) -> None:
        """Write aligned `data` at byte `at`."""
        done = 0
        while done < len(data):
            done += self._retry(lambda rest, at: os.pwrite(self.descriptor, rest, at), data[done:], at + done)

    def read(self, buffer: np.ndarray, at: int) -> int:
        """Read into an aligned `buffer` from byte `at` on; returns how many bytes, fewer only at the file's end."""
        done = 0
        while done < len(buffer):
            count = self._retry(lambda rest, at: os.preadv(self.descriptor, [rest], at), buffer[done:], at + done)
            done += count
            if count == 0 or (self.is_direct and done % ALIGNMENT):  # the file's end, in the middle of a block
                break
        return done

    def _retry(self, access: Callable[[np.ndarray, int], int], data: np.ndarray, at: int) -> int:
        """Call `access` again through the page cache where the file system refuses direct I/O at the first access
        only."""
        was_direct = self.is_direct
        try:
            return access(data, at)
        except OSError as error:
            if error.errno not in REFUSED or not was_direct:
                raise
            self._go_through_the_cache()
            return access(data, at)

    def _go_through_the_cache(self) -> None:
        self.is_direct = False
        flags = fcntl.fcntl(self.descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self.descriptor, fcntl.F_SETFL, flags & ~DIRECT)
        say_refused(self.path.absolute().parent)


@functools.cache
def say_refused(folder: Path) -> None:
    log.info("%s is on a file system without direct I/O: through the page cache, more slowly", folder)
