"""Megatron's sequence parallelism (arXiv 2205.05198): between split layers each tensor-parallel rank has a slice of the
tokens.

Norms, residual sums and scales act per token, so a rank computes them for its slice. The B x N tokens of a microbatch,
flattened, are cut into equal slices of S tokens. B x N need not be a multiple of tp: the last slices are padded with
zeros, whose outputs stay finite and whose gradients are zero.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tn.parallel.collectives import copy_to
from megatron_tn.parallel.context import Axis
from megatron_tn.parallel.products import padded


class TokenSlices:
    """[batch, length] tokens, cut into one slice of S = ceil(batch x length / axis.size) tokens per rank."""

    def __init__(self, axis: Axis, batch: int, length: int):
        self.axis = axis
        self.shape = (batch, length)
        self.rows = batch * length

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """After split layers: x [B, N, D] on each rank -> this rank's slice [S, D] of the sum over ranks."""
        return _ReduceScatter.apply(x.flatten(0, 1), self.axis, self.rows)

    def all_gather(self, x: Tensor) -> Tensor:
        """Before split layers: this rank's slice x [S, D] -> all tokens [B, N, D]. dx is summed over ranks."""
        return _AllGather.apply(x, self.axis, self.rows).unflatten(0, self.shape)

    def take(self, per_position: Tensor) -> Tensor:
        """Values [N], one for each position of a row -> [S], those of this rank's slice; padding repeats the last."""
        count = -(-self.rows // self.axis.size)
        token = torch.arange(count, device=per_position.device) + self.axis.rank * count
        return per_position[token.clamp(max=self.rows - 1) % self.shape[1]]

    def repeated(self, parameter: Tensor) -> Tensor:
        """A replicated parameter that each rank applies to its own slice. Its gradient is summed over ranks."""
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
