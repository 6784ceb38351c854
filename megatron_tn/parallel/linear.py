"""Linear layers whose weight is split over tensor parallel. No bias anywhere, as in the released family."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_tn.parallel.collectives import reduce_from
from megatron_tn.parallel.context import Axis
from megatron_tn.parallel.main_gradient import weight_gradient
from megatron_tn.parallel.sharding import ShardSpec, mark


class _Linear(torch.autograd.Function):
    """x weight^T, whose weight's gradient goes to its main gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.main = weight.main_gradient
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight = ctx.saved_tensors
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        return dx, weight_gradient(weight, ctx.main, dy, x) if ctx.needs_input_grad[1] else None


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [.., in], weight [out, in] -> [.., out]."""
    # A compiler cannot follow a sum that lives outside its graph, and hooks want to see a gradient: autograd hands one
    # out then, which is added to the sum after.
    if not hasattr(weight, "main_gradient") or torch.compiler.is_compiling() or weight._backward_hooks:
        return F.linear(x, weight)
    return _Linear.apply(x, weight)


class ColumnParallelLinear(nn.Module):
    """y_local = x W_local^T with W [out, in] split along `out`, block by block for a fused projection.

    Input x [..., in] is the same on every rank; output [..., out / tp] is this rank's columns, each block's in turn.
    Inputs are not copied into the split region here: layers that share an input share one `copy_to`, done by the
    caller, so that their input gradients are reduced once.
    """

    def __init__(self, in_features: int, out_features: int, axis: Axis, *, blocks: int = 1):
        super().__init__()
        spec = ShardSpec((out_features, in_features), dim=0, blocks=blocks)
        self.weight = mark(nn.Parameter(torch.empty(spec.local_shape(axis.rank, axis.size))), spec)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class RowParallelLinear(nn.Module):
    """y = sum over ranks of x_local W_local^T with W [out, in] split along `in`.

    Input [..., in / tp] is this rank's part; output [..., out] is whole, on every rank.
    """

    def __init__(self, in_features: int, out_features: int, axis: Axis):
        super().__init__()
        self.axis = axis
        spec = ShardSpec((out_features, in_features), dim=1)
        self.weight = mark(nn.Parameter(torch.empty(spec.local_shape(axis.rank, axis.size))), spec)

    def forward(self, x: Tensor) -> Tensor:
        return reduce_from(linear(x, self.weight), self.axis)
