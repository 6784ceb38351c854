"""Megatron's sequence parallelism (arXiv 2205.05198): between split layers each tensor-parallel rank has a slice of the
tokens.

Norms, residual sums and scales act on each token alone, so a rank computes them for its slice. The B x N tokens of a
microbatch, as one row, are cut into equal slices of S; the last slices are padded with zeros, which these operations
keep finite and whose gradients are zero, so B x N need not divide by tp.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tn.parallel.collectives import copy_to
from megatron_tn.parallel.context import Axis
from megatron_tn.parallel.products import padded


class TokenSlices:
    """[batch, length] tokens, cut into axis.size slices of S = ceil(batch length / axis.size) tokens, one a rank."""

    def __init__(self, axis: Axis, batch: int, length: int):
        self.axis = axis
        self.shape = (batch, length)
        self.rows = batch * length

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """x [B, N, D], each rank's term of a sum, after split layers -> this rank's slice [S, D] of the sum."""
        return _ReduceScatter.apply(x.flatten(0, 1), self.axis, self.rows)

    def all_gather(self, x: Tensor) -> Tensor:
        """This rank's slice x [S, D] before split layers -> all tokens [B, N, D]. Gradients are summed over ranks."""
        return _AllGather.apply(x, self.axis, self.rows).unflatten(0, self.shape)

    def repeated(self, parameter: Tensor) -> Tensor:
        """A parameter that every rank holds whole and applies to its own slice. Its gradients are summed over ranks."""
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
