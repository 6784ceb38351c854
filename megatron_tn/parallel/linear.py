"""Linear layers without bias, as in the released family, whose weight is split over tensor-parallel ranks.

`slices`: the `TokenSlices` of sequence parallelism, where each rank holds a slice of the tokens between split layers;
None: every rank holds all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megatron_tn.parallel import float8_products
from megatron_tn.parallel.context import Axis
from megatron_tn.parallel.products import column_products, row_product
from megatron_tn.parallel.sequence import TokenSlices
from megatron_tn.parallel.sharding import ShardSpec, mark
from megatron_tn.precision.fp8 import Float8Weight
from megatron_tn.precision.gradient_sum import gradient_sum
from megatron_tn.precision.matmul import in_fp8, linear


class SplitLinear(nn.Module):
    """float8: set where the layer's products are to be in fp8 (engine/float8.py)."""

    axis: Axis
    weight: nn.Parameter
    float8: Float8Weight | None = None


class ColumnParallelLinear(SplitLinear):
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
            return linear(x, [self.weight], [self.float8])[0]
        return _columns(x, [self], slices)[0]


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
    if axis.size == 1:
        return linear(x, [layer.weight for layer in layers], [layer.float8 for layer in layers])
    return _columns(x, layers, slices)


def _columns(x: Tensor, layers: Sequence[ColumnParallelLinear], slices: TokenSlices | None) -> list[Tensor]:
    axis, weights, float8 = layers[0].axis, [layer.weight for layer in layers], [layer.float8 for layer in layers]
    if slices is None:
        shape, rows = x.shape[:-1], 0
    else:
        shape, rows = slices.shape, slices.rows
    x = x.flatten(0, -2)
    if in_fp8(float8):
        outs = float8_products.column_products(x, weights, float8, axis, rows)
    else:
        outs = column_products(x, weights, axis.name, rows)
    return [out.unflatten(0, shape) for out in outs]


class RowParallelLinear(SplitLinear):
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
            (y,) = linear(x, [self.weight], [self.float8])
            return y if beside is None else (y, beside)
        shape, rows = (x.shape[:-1], 0) if slices is None else ((-1,), slices.rows)
        flat = None if beside is None else beside.flatten()
        x = x.flatten(0, -2)
        if in_fp8([self.float8]):
            y, summed = float8_products.row_product(x, self.weight, self.float8, self.axis, rows, flat)
        else:
            y, summed = row_product(x, self.weight, self.axis.name, rows, flat)
        y = y.unflatten(0, shape)
        return y if beside is None else (y, summed.view(y.shape[:-1]))
