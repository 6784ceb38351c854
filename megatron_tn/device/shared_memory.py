"""Host memory that other processes of this machine can map: an anonymous file, opened through /proc.

Not a file in /dev/shm, which containers limit to 64 MiB. The name of an anonymous file is random here, and a process
opens nothing but a link to that name: so a process of the same number in another container or on another machine is
never taken for the owner.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import uuid
import weakref
from typing import NamedTuple

import numpy as np
import torch


class Address(NamedTuple):
    """link: the file as the owner has it open, /proc/PID/fd/N. target: where `link` points."""

    link: str
    target: str


class SharedMemory:
    """`block`: fp32 [elements] of zeros at a page boundary; a page takes memory once it is written to. `address`: for
    other processes; None where the system has or allows no anonymous files. Processes that are forked or map the memory
    keep it, beyond this object, until they end or `free` is called.

    Raises:
        OSError: the system has not so much memory.
    """

    def __init__(self, elements: int):
        size = max(elements, 1) * torch.float32.itemsize
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.address: Address | None = None
        name = f"megatron_tn-{uuid.uuid4().hex}"
        # AttributeError: not Linux. OSError: a sandbox or vm.memfd_noexec forbids anonymous files. Linux refuses too
        # large a private memory, but no file of any size.
        with contextlib.suppress(AttributeError, OSError):
            descriptor = os.memfd_create(name)
            weakref.finalize(self, os.close, descriptor)
            os.ftruncate(descriptor, size)
            memory = mmap.mmap(descriptor, size)
            self.address = Address(f"/proc/{os.getpid()}/fd/{descriptor}", f"/memfd:{name} (deleted)")
        if hasattr(mmap, "MADV_DONTFORK"):
            memory.madvise(mmap.MADV_DONTFORK)  # data workers are forked, and need no pages of this memory
        self._memory = memory
        self.block = torch.frombuffer(memory, dtype=torch.float32)[:elements]

    def free(self) -> None:
        """Give the pages back to the system, whoever has them mapped: `block` is zeros from then on."""
        if self.address is not None:
            self._memory.madvise(mmap.MADV_REMOVE)


def mapped(address: Address) -> np.ndarray | None:
    """The bytes of another process's `SharedMemory`, uint8 [size], to be read only; None where it is not on this
    machine or not open to this process."""
    try:
        if os.readlink(address.link) != address.target:
            return None
        with open(address.link, "rb") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)
    except OSError:
        return None
