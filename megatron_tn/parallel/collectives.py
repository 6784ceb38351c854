"""Collectives with gradients (Megatron-LM, arXiv 1909.08053, section 3), and collectives outside autograd.

    copy_to      identity forward,    all-reduce backward    into column-parallel layers
    reduce_from  all-reduce forward,  identity backward      out of row-parallel layers
    gather_from  all-gather forward,  own slice backward     out of column-parallel layers, along the last dimension

On an axis of size 1 each returns its input, so model code needs no branch on tp.
"""

import contextlib
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tn.parallel.context import Axis

# PyTorch 2.13 names some collectives anew; PyTorch 2.11 and DeepSpeed have the old names alone.
warnings.filterwarnings("ignore", message=".*torch.distributed.*deprecated", category=FutureWarning)


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        # The all-reduce works on a copy: autograd may hand the same gradient tensor to several nodes.
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


class _GatherFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:
        ctx.start, ctx.length = axis.rank * x.shape[-1], x.shape[-1]
        return all_gather(x, axis, dim=-1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.narrow(-1, ctx.start, ctx.length), None


def copy_to(x: Tensor, axis: Axis) -> Tensor:
    """x, equal on every rank of `axis`, as input of layers split over `axis`. dx is summed over ranks."""
    return x if axis.size == 1 else _CopyTo.apply(x, axis.group)


def reduce_from(x: Tensor, axis: Axis) -> Tensor:
    """The sum over the ranks of `axis` of x, the output of layers split over `axis`; dx is the gradient of the sum."""
    return x if axis.size == 1 else _ReduceFrom.apply(x, axis.group)


def gather_from(x: Tensor, axis: Axis) -> Tensor:
    """Every rank's x [..., n], concatenated [..., n * size]; dx is this rank's columns of the gradient."""
    return x if axis.size == 1 else _GatherFrom.apply(x, axis)


def all_reduce_(x: Tensor, axis: Axis, op: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
    """Reduce x over `axis` in place, outside autograd; returns x."""
    if axis.size > 1:
        dist.all_reduce(x, op=op, group=axis.group)
    return x


def all_gather(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """Every rank's x, concatenated along `dim` in rank order, outside autograd. Shapes must agree over ranks."""
    if axis.size == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(axis.size)]
    dist.all_gather(parts, x.contiguous(), group=axis.group)
    return torch.cat(parts, dim=dim)


def gather_objects(value: Any, axis: Axis) -> list[Any]:
    """Every rank's value, in rank order. Pickle must carry it."""
    if axis.size == 1:
        return [value]
    found: list[Any] = [None] * axis.size
    dist.all_gather_object(found, value, group=axis.group)
    return found


def gather_parts_(buffers: Sequence[Tensor], axis: Axis) -> None:
    """All-gather flat buffers in place, outside autograd: each has axis.size equal parts, rank n contributes the nth.

    ZeRO's all-gather of updated parameters (arXiv 1910.02054, section 5.1).
    """
    if axis.size == 1:
        return
    # One NCCL group call: 18 separate all-gathers of a 1B model take a third longer (docs/measurements/2026-11-28.md).
    # Gloo's coalesced call would copy all buffers, so gloo gathers them one by one.
    grouped = dist._coalescing_manager(axis.group) if buffers[0].is_cuda else contextlib.nullcontext()
    with grouped:
        for buffer in buffers:
            dist.all_gather_into_tensor(buffer, buffer.chunk(axis.size)[axis.rank], group=axis.group)
