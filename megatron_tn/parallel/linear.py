"""Linear layers without bias, as in the released family, whose weight is split over tensor-parallel ranks.

`slices`: the `TokenSlices` of sequence parallelism, where each rank holds a slice of the tokens between split layers;
None: every rank holds all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megatron_tn.parallel.context import Axis
from megatron_tn.parallel.products import column_products, row_product
from megatron_tn.parallel.sequence import TokenSlices
from megatron_tn.parallel.sharding import ShardSpec, mark
from megatron_tn.precision.gradient_sum import gradient_sum
from megatron_tn.precision.matmul import linear


class ColumnParallelLinear(nn.Module):
    """y_local = x W_local^T with W [out, in] split along `out`, block by block for a fused projection.

    x [..., in], the same on every rank -> this rank's columns [..., out / tp], block after block. With `slices`: x is
    this rank's slice [S, in] of [B, N] tokens -> [B, N, out / tp].
    """

    def __init__(self, in_features: int, out_features: int, axis: Axis, *, blocks: int = 1):
        super().__init__()
        self.axis = axis
        spec = ShardSpec((out_features, in_features), dim=0, blocks=blocks)
        self.weight = mark(nn.Parameter(torch.empty(spec.local_shape(axis.rank, axis.size))), spec)

    def forward(self, x: Tensor, slices: TokenSlices | None = None) -> Tensor:
        if self.axis.size == 1:
            return linear(x, [self.weight])[0]
        return _columns(x, [self.weight], self.axis, slices)[0]


def column_parallel(
    x: Tensor, layers: Sequence[ColumnParallelLinear], slices: TokenSlices | None = None
) -> list[Tensor]:
    """Each layer's output for one input x, with one all-gather of x and one reduction of dx for all layers.

    With tp > 1, and where the engine keeps gradient sums, the weights are read without calling their layers' forward.
    An engine that gathers weights in forward hooks must gather a whole block at once (ZeRO 3's leaf modules,
    `partition_parameters` of engine.deepspeed.adapter).
    """
    axis = layers[0].axis
    if axis.size == 1 and gradient_sum(layers[0].weight) is None:
        return [layer(x) for layer in layers]
    weights = [layer.weight for layer in layers]
    return linear(x, weights) if axis.size == 1 else _columns(x, weights, axis, slices)


def _columns(x: Tensor, weights: list[Tensor], axis: Axis, slices: TokenSlices | None) -> list[Tensor]:
    if slices is None:
        shape, rows = x.shape[:-1], 0
    else:
        shape, rows = slices.shape, slices.rows
    outs = column_products(x.flatten(0, -2), weights, axis.name, rows)
    return [out.unflatten(0, shape) for out in outs]


class RowParallelLinear(nn.Module):
    """y = sum over ranks of x_local W_local^T with W [out, in] split along `in`.

    Input [B, N, in / tp]: this rank's columns. Output: [B, N, out] on every rank, or this rank's token slice [S, out].
    """

    def __init__(self, in_features: int, out_features: int, axis: Axis):
        super().__init__()
        self.axis = axis
        spec = ShardSpec((out_features, in_features), dim=1)
        self.weight = mark(nn.Parameter(torch.empty(spec.local_shape(axis.rank, axis.size))), spec)

    def forward(
        self, x: Tensor, slices: TokenSlices | None = None, *, beside: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """y. With `beside` [B, N], one number per token: (y, sum over ranks of `beside`, in its dtype); the reduction
        overlaps with the product."""
        if self.axis.size == 1:
            (y,) = linear(x, [self.weight])
            return y if beside is None else (y, beside)
        shape, rows = (x.shape[:-1], 0) if slices is None else ((-1,), slices.rows)
        flat = None if beside is None else beside.flatten()
        y, summed = row_product(x.flatten(0, -2), self.weight, self.axis.name, rows, flat)
        y = y.unflatten(0, shape)
        return y if beside is None else (y, summed.view(y.shape[:-1]))
