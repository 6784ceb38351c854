"""Tensors of interpreted kernels whose memory ends at a page that may not be touched.

Triton's interpreter copies the storage of every tensor of a launch to the host, and the results back; here the copy is
placed so. A kernel that reads or writes behind a tensor, without a mask, ends the test by a segmentation fault, where
otherwise it would find whatever stands there: on a GPU that is an error on some days only.
"""

import ctypes
import mmap

import torch

_libc = ctypes.CDLL(None, use_errno=True)


def guarded(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """A copy of a storage whose last byte is the last one of its pages; the page behind it is protected."""
    if not (size := storage.nbytes()):
        return storage
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    region = mmap.mmap(-1, pages + mmap.PAGESIZE)
    behind = ctypes.addressof(ctypes.c_char.from_buffer(region)) + pages
    no_access = 0
    if _libc.mprotect(ctypes.c_void_p(behind), ctypes.c_size_t(mmap.PAGESIZE), no_access):
        raise OSError(ctypes.get_errno(), "mprotect")
    copy = torch.frombuffer(region, dtype=torch.uint8, count=size, offset=pages - size).untyped_storage()
    copy.copy_(storage)
    return copy


def guard_arguments(monkeypatch) -> None:
    """Have the interpreter's launches work on guarded copies."""
    monkeypatch.setattr(torch.UntypedStorage, "cpu", guarded)
