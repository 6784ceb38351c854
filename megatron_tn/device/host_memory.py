"""One large block of host memory that is reused, page-locked where a GPU copies into it.

Page-locking memory that nothing has written makes the driver fault in one page after the other: 12 GiB take 5.6 s on an
H200's host. So threads write to each page first. (Not in huge pages: where memory is fragmented, the kernel compacts
it first, which took six times as long.)
"""

import mmap
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_tn.device.graph import CAPTURE
from megatron_tn.device.shared_memory import Address, SharedMemory
from megatron_tn.device.threads import in_parallel, start_thread

FAULT_THREADS = 8
FAULT_BYTES = 64 << 20  # bytes that one thread faults in per call


class HostMemory:
    """A block of fp32 elements that begins at a page boundary (direct I/O needs that), kept from one use to the next.

    Page-locked (pinned) by cudaHostRegister, because torch's pinned allocator rounds up to a power of two: 70 GiB of a
    rank's masters and moments would take 128 GiB.
    """

    def __init__(self) -> None:
        self._memory: SharedMemory | None = None
        self._block = torch.empty(0)
        self._pinned = False
        self._preparing: threading.Thread | None = None
        self._error: Exception | None = None

    def prepare(self, elements: int, pinned: bool, fill: Callable[[Tensor], None] | None = None) -> None:
        """Begin to make a block of fp32 [elements] in a thread, unless there is a large enough one; `take` waits.

        fill: called in the thread with the first `elements` of the block, which it writes. Only then is the block
        page-locked: what has written to a page has faulted it in."""
        self.join()
        self._error = None
        if self._block.numel() < elements:
            self.release()
            self._preparing = start_thread(lambda: self._make(elements, pinned, fill), "host-memory")
        elif fill is not None:
            self._preparing = start_thread(lambda: fill(self._block[:elements]), "host-memory")

    def take(self, elements: int, pinned: bool) -> Tensor:
        """fp32 [elements]. It aliases the tensors of earlier calls."""
        self.prepare(elements, pinned)
        self.join()
        if self._error is not None:
            raise self._error
        return self._block[:elements]

    @property
    def address(self) -> Address | None:
        """Of the block, for the other processes of this machine."""
        return self._memory.address if self._memory is not None else None

    def release(self) -> None:
        """Free the block. Tensors of earlier calls are zeros from then on; without anonymous files they keep it."""
        self.join()
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._block.data_ptr())
        if self._memory is not None:
            self._memory.free()  # data workers, which are forked, would keep it
        self._memory, self._block, self._pinned = None, torch.empty(0), False

    def join(self) -> None:
        """Wait until a block that `prepare` began is made."""
        if self._preparing is not None:
            self._preparing.join()
            self._preparing = None

    def _make(self, elements: int, pinned: bool, fill: Callable[[Tensor], None] | None) -> None:
        try:
            self._memory = SharedMemory(elements)
            self._block = block = self._memory.block
            (fill or fault_in)(block)
        except Exception as error:  # out of memory: `take` tries again, and raises
            self._error = error
            return
        if pinned:
            # Where the operating system refuses to pin this much memory, copies are only slower. CUDA's last error,
            # which the next kernel launch raises, is kept per thread, so training's thread does not see this one.
            with CAPTURE:
                size = elements * block.element_size()
                self._pinned = int(torch.cuda.cudart().cudaHostRegister(block.data_ptr(), size, 0)) == 0


def fault_in(block: Tensor) -> None:
    """Write to every page of `block`, fp32 [n] of `SharedMemory`."""
    per_page = mmap.PAGESIZE // torch.float32.itemsize
    in_parallel(Tensor.zero_, block[::per_page].split(FAULT_BYTES // mmap.PAGESIZE), threads=FAULT_THREADS)
