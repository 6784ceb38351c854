"""Linear layers whose weight is split over tensor parallel. No bias anywhere, as in the released family."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_tn.parallel.collectives import reduce_from
from megatron_tn.parallel.context import Axis
from megatron_tn.parallel.sharding import ShardSpec, mark


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
        return F.linear(x, self.weight)


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
        return reduce_from(F.linear(x, self.weight), self.axis)
