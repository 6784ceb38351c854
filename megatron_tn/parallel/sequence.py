"""Megatron's sequence parallelism (arXiv 2205.05198): between split regions each tensor-parallel rank holds a slice.

Norms, residuals and scales are work on each token alone, so no rank need do it for all of them. The B x N tokens of a
microbatch are taken as one row and cut into equal slices, the last ones filled up with zeros, which every such
operation keeps finite and whose gradient is zero: no size has to divide.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tn.parallel.collectives import copy_to
from megatron_tn.parallel.context import Axis
from megatron_tn.parallel.products import padded


class TokenSlices:
    """How [batch, length] tokens are shared out over `axis`, each rank holding [S, ...] of them."""

    def __init__(self, axis: Axis, batch: int, length: int):
        self.axis = axis
        self.shape = (batch, length)
        self.rows = batch * length

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Every rank's part x [B, N, D] of a sum leaves split work: this rank's slice of the sum, [S, D]."""
        return _ReduceScatter.apply(x.flatten(0, 1), self.axis, self.rows)

    def all_gather(self, x: Tensor) -> Tensor:
        """Slices x [S, D] enter split work: all tokens, [B, N, D]; their gradients are summed over ranks."""
        return _AllGather.apply(x, self.axis, self.rows).unflatten(0, self.shape)

    def repeated(self, parameter: Tensor) -> Tensor:
        """A parameter that every rank holds whole and applies to its slice: its gradients are summed over ranks."""
        return copy_to(parameter, self.axis)


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis, rows: int) -> Tensor:
        ctx.axis, ctx.rows = axis, rows
        return _scattered_sum(x, axis)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _gathered(gradient, ctx.axis, ctx.rows), None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis, rows: int) -> Tensor:
        ctx.axis = axis
        return _gathered(x, axis, rows)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _scattered_sum(gradient, ctx.axis), None, None


def _scattered_sum(x: Tensor, axis: Axis) -> Tensor:
    x = padded(x, axis.size)
    out = x.new_empty(x.shape[0] // axis.size, x.shape[1])
    dist.reduce_scatter_tensor(out, x, group=axis.group)
    return out


def _gathered(x: Tensor, axis: Axis, rows: int) -> Tensor:
    out = x.new_empty(axis.size * x.shape[0], x.shape[1])
    dist.all_gather_into_tensor(out, x.contiguous(), group=axis.group)
    return out[:rows]
