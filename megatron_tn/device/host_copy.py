"""Asynchronous copies of device tensors to the host."""

import torch
from torch import Tensor


class HostCopy:
    """An asynchronous copy of `tensor` to page-locked host memory.

    The constructor queues the copy on the current stream and records an event after it; `read` waits for that event
    only, not for kernels queued later. For a CPU tensor `read` returns the tensor itself.
    """

    def __init__(self, tensor: Tensor):
        self._done = None
        self._host = tensor
        if tensor.device.type == "cuda":
            self._host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()

    def read(self) -> Tensor:
        """Wait for the copy, and return the host tensor."""
        if self._done is not None:
            self._done.synchronize()
        return self._host
