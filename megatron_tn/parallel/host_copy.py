"""What the device works out and the host wants to know, without a halt of either."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """A copy of a tensor on its way to the host, which does not wait for it before `read`."""

    def __init__(self, tensor: Tensor):
        self._done = None
        self._host = tensor
        if tensor.device.type == "cuda":
            self._host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()

    def read(self) -> Tensor:
        if self._done is not None:
            self._done.synchronize()
        return self._host
