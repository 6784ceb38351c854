"""Counts the bytes of live tensors, real or fake, operator by operator."""

import weakref
from collections.abc import Callable, Mapping

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

BLOCK = 512  # bytes: PyTorch's CUDA allocator rounds requests up to a multiple


class LiveMemory(TorchDispatchMode):
    """Context manager. A storage is counted from the operator that returned it until it is freed.

    current, peak: live bytes now, and their maximum. rounding: bytes; each storage is rounded up to a multiple.
    workspace: operator name -> function of the operator's arguments: temporary bytes beside inputs and outputs.
    """

    def __init__(self, rounding: int = 1, workspace: Mapping[str, Callable[..., int]] | None = None):
        super().__init__()
        self.rounding = rounding
        self.workspace = workspace or {}
        self.current = self.peak = 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        if needs := self.workspace.get(str(operator)):
            self.peak = max(self.peak, self.current + needs(*args, **(kwargs or {})))
        return out

    def add(self, tensor: Tensor) -> None:
        """Count `tensor`'s storage once."""
        if is_traceable_wrapper_subclass(tensor):  # such as a DTensor: count the inner tensors
            for name in tensor.__tensor_flatten__()[0]:
                if isinstance(inner := getattr(tensor, name), Tensor):
                    self.add(inner)
            return
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = -(-storage.nbytes() // self.rounding) * self.rounding
        self._seen[key] = size
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.current -= self._seen.pop(key, 0)
