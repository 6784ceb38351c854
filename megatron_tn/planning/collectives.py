"""The collectives that a rank takes part in, recorded while its code runs on fake tensors."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Collective(NamedTuple):
    """kind: "all-gather", "reduce-scatter", "all-reduce", "reduce", "broadcast", "all-to-all" or "barrier".

    group: name of the process group. size: bytes of the whole tensor: what an all-gather returns, and what the others
    take. dtype: of its elements.
    """

    kind: str
    group: str
    size: int
    dtype: str


class Call(NamedTuple):
    """One collective of a rank. ranks: the members of its group. size: bytes of the whole tensor."""

    kind: str
    ranks: tuple[int, ...]
    size: int
    dtype: str

    def __str__(self) -> str:
        members = f"{self.ranks[0]}, {self.ranks[1]}, .. {self.ranks[-1]}" if len(self.ranks) > 3 else str(self.ranks)
        return f"{self.kind} of {self.size:,} bytes of {self.dtype} over ranks {members}"

    @property
    def shape(self) -> tuple[str, int, int]:
        """Kind, members and their distance: equal on all ranks, whose slices of a sequence differ in length."""
        return self.kind, len(self.ranks), self.ranks[-1] - self.ranks[0]


class CollectiveLog(TorchDispatchMode):
    """Context manager. `calls`: the collectives in order, those within the operators of `INNER` included."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Collective] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.calls += collectives_of(operator, args, kwargs or {})
        return operator(*args, **(kwargs or {}))


def collectives_of(operator: Any, args: tuple, kwargs: dict) -> Iterator[Collective]:
    """The collectives that this call of an operator makes."""
    name = str(operator).rpartition(".")[0]
    if (inner := INNER.get(name)) is not None:
        yield from inner(*args, **kwargs)
    elif name.startswith(("c10d.", "_c10d_functional.")) and name not in SILENT:
        kind, whole = KINDS[name]
        tensors = [leaf for leaf in tree_leaves(args[whole]) if isinstance(leaf, Tensor)]
        size = sum(map(bytes_of, tensors))
        if name == "_c10d_functional.all_gather_into_tensor":
            size *= args[1]
        yield Collective(kind, group_of(args), size, dtype_of(tensors[0]) if tensors else "")


def bytes_of(x: Tensor) -> int:
    return x.numel() * x.element_size()


def dtype_of(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def group_of(args: tuple) -> str:
    """Name of the process group among an operator's arguments: an object of the c10d operators, the last string of the
    functional ones."""
    names = []
    for value in args:
        if isinstance(value, str):
            names.append(value)
        elif type(value).__name__ == "ScriptObject" and "ProcessGroup" in str(value._type()):
            return dist.ProcessGroup.unbox(value).group_name
    return names[-1]


# Operator -> kind, and the argument that is the whole tensor.
KINDS = {
    "c10d._allgather_base_": ("all-gather", 0),
    "c10d.allgather_": ("all-gather", 0),
    "c10d.allgather_into_tensor_coalesced_": ("all-gather", 0),
    "c10d._reduce_scatter_base_": ("reduce-scatter", 1),
    "c10d.reduce_scatter_": ("reduce-scatter", 1),
    "c10d.reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
    "c10d.allreduce_": ("all-reduce", 0),
    "c10d.allreduce_coalesced_": ("all-reduce", 0),
    "c10d.reduce_": ("reduce", 0),
    "c10d.broadcast_": ("broadcast", 0),
    "c10d.alltoall_base_": ("all-to-all", 0),  # the tensor that this rank receives
    "c10d.barrier": ("barrier", 0),
    "_c10d_functional.all_gather_into_tensor": ("all-gather", 0),
    "_c10d_functional.reduce_scatter_tensor": ("reduce-scatter", 0),
    "_c10d_functional.all_reduce": ("all-reduce", 0),
    "_c10d_functional.all_reduce_": ("all-reduce", 0),
}
SILENT = {"_c10d_functional.wait_tensor", "c10d.monitored_barrier_"}


def _column_forward(x: Tensor, weights: list[Tensor], group: str, rows: int) -> Iterator[Collective]:
    if rows:
        yield _gathered(x, group)


def _row_forward(
    x: Tensor, weight: Tensor, group: str, rows: int, beside: Tensor | None = None
) -> Iterator[Collective]:
    """x [T, in], weight [out, in]; beside [T]: the sum of o^2, reduced first."""
    yield from _row_sums(x.shape[0], weight.shape[0], x.dtype, group, rows, beside)


def _row_sums(
    tokens: int, width: int, dtype: torch.dtype, group: str, rows: int, beside: Tensor | None
) -> Iterator[Collective]:
    kind, tokens = ("reduce-scatter", _padded(rows, group)) if rows else ("all-reduce", tokens)
    if beside is not None:
        yield Collective(kind, group, tokens * beside.element_size(), dtype_of(beside))
    yield Collective(kind, group, tokens * width * dtype.itemsize, str(dtype).removeprefix("torch."))


def _row_backward(gradient: Tensor, beside: Tensor, weight: Tensor, group: str, rows: int) -> Iterator[Collective]:
    yield _gathered(gradient, group)
    if beside.numel():
        yield _gathered(beside, group)


def _column_forward_fp8(x: Tensor, *rest: Any) -> Iterator[Collective]:
    *_, group, rows, _ = rest
    yield from _column_forward(x.view(torch.uint8), [], group, rows)


def _row_forward_fp8(x: Tensor, *rest: Any) -> Iterator[Collective]:
    _, _, _, width, group, rows, dtype, *beside = rest
    yield from _row_sums(x.shape[0], width, dtype, group, rows, beside[0] if beside else None)


def _row_backward_fp8(gradient: Tensor, scale: Tensor, beside: Tensor, *rest: Any) -> Iterator[Collective]:
    *_, group, rows, _ = rest
    yield from _row_backward(gradient.view(torch.uint8), beside, gradient, group, rows)


def _slice_backward(*args: Any) -> Iterator[Collective]:
    """The state's gradient has the shape of `initial_state` [B, H, K, d], the operator's tenth argument."""
    yield _gathered(args[9], args[16])


def _gathered(x: Tensor, group: str) -> Collective:
    return Collective("all-gather", group, bytes_of(x) * ranks_of(group), dtype_of(x))


def ranks_of(group: str) -> int:
    return dist.distributed_c10d._resolve_process_group(group).size()


def _padded(rows: int, group: str) -> int:
    ranks = ranks_of(group)
    return ranks * -(-rows // ranks)


# Operators that make collectives within one call (parallel/products.py, kernels/gla/slice.py) -> those collectives.
INNER: dict[str, Callable[..., Iterator[Collective]]] = {
    "megatron_tn.column_forward": _column_forward,
    "megatron_tn.row_forward": _row_forward,
    "megatron_tn.row_backward": _row_backward,
    "megatron_tn.column_forward_fp8": _column_forward_fp8,
    "megatron_tn.row_forward_fp8": _row_forward_fp8,
    "megatron_tn.row_backward_fp8": _row_backward_fp8,
    "megatron_tn.gla_slice_backward": _slice_backward,
}
