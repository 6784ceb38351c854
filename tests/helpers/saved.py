"""What autograd keeps for a backward pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def saved_bytes(graph_of: Callable[[], Any], exclude: tuple[Tensor, ...] = ()) -> int:
    """Bytes of the distinct storages that autograd saves for the backward pass of `graph_of()`.

    exclude: tensors not counted, such as parameters.
    """
    own = {tensor.untyped_storage()._cdata for tensor in exclude}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        graph_of()  # must keep its graph alive: the address of a freed storage may be reused
    return sum(kept.values())
