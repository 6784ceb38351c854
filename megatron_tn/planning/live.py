"""Bytes that live tensors hold, followed operator by operator; real tensors and fake ones alike."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

BLOCK = 512  # bytes to which CUDA's caching allocator rounds each request up


class LiveMemory(TorchDispatchMode):
    """Use as a context manager. A storage counts from the operator that made it until it is freed.

    current, peak: bytes now and at most. rounding: of each storage. workspace: operator's name -> bytes that it needs
    while it runs, beside its inputs and outputs, as a function of its arguments.
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
        """Count `tensor`'s storage, unless it is counted already."""
        if is_traceable_wrapper_subclass(tensor):  # a DTensor, whose own storage is a pretence
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


def saved_bytes(graph_of: Callable[[], Any], exclude: tuple[Tensor, ...] = ()) -> int:
    """Bytes of distinct storages that autograd keeps for the backward pass of what `graph_of` runs.

    exclude: tensors that are held anyway, such as parameters.
    """
    own = {tensor.untyped_storage()._cdata for tensor in exclude}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        graph_of()  # its graph must stay alive for storages to keep their identity
    return sum(kept.values())
