"""Linear layers without bias, as in the released family, whose weight is split over tensor-parallel ranks.

`slices`: the `TokenSlices` of sequence parallelism, where each rank holds a slice of the tokens between split layers;
None: every rank holds all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kernels import sglu
from kernels.float8_linear.op import float8_linear
from megatron_tn.parallel import float8_products
from megatron_tn.parallel.context import Axis
from megatron_tn.parallel.products import column_products, row_product, summed_over_ranks
from megatron_tn.parallel.sequence import TokenSlices
from megatron_tn.parallel.sharding import ShardSpec, mark
from megatron_tn.precision.fp8 import Float8Weights
from megatron_tn.precision.gradient_sum import gradient_sum
from megatron_tn.precision.matmul import linear


class SplitLinear(nn.Module):
    """float8: of the layers in `together`, where their products are to be in fp8 (float8_layers.py).
    together: this layer and those that always get the same input, in their order; empty: this layer alone.
    weight_scale: fp32 [out] where the weight itself is kept in fp8 (fp8_weights.py), which needs passes without slices;
    None elsewhere."""

    axis: Axis
    weight: nn.Parameter
    weight_scale: nn.Parameter | None
    float8: Float8Weights | None = None
    together: tuple[SplitLinear, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("weight_scale", None)

    def in_fp8(self) -> bool:
        """Whether this pass forms the layer's products in fp8: only one with gradients does.

        Raises:
            RuntimeError: a pass without gradients, while the engine holds the weight in fp8 alone.
        """
        if self.float8 is None or torch.is_grad_enabled():
            return self.float8 is not None
        if self.float8.kept is not None and not self.weight.untyped_storage().size():
            raise RuntimeError(
                "a forward pass without gradients needs the weight in the computing type, but the engine holds it in "
                "fp8 alone: run the pass within Engine.whole_weights"
            )
        return False


class ColumnParallelLinear(SplitLinear):
    """y_local = x W_local^T with W [out, in] split along `out`, block by block for a fused projection.

    x [..., in], the same on every rank -> this rank's columns [..., out / tp], block after block. With `slices`: x is
    this rank's slice [S, in] of [B, N] tokens -> [B, N, out / tp]. heads: of each block, see `ShardSpec`.
    """

    def __init__(self, in_features: int, out_features: int, axis: Axis, *, blocks: int = 1, heads: int = 1):
        super().__init__()
        self.axis = axis
        spec = ShardSpec((out_features, in_features), dim=0, blocks=blocks, heads=heads)
        self.weight = mark(nn.Parameter(torch.empty(spec.local_shape(axis.rank, axis.size))), spec)

    def forward(self, x: Tensor, slices: TokenSlices | None = None) -> Tensor:
        return column_parallel(x, [self], slices)[0]


def share_input(*layers: ColumnParallelLinear) -> None:
    """Say that `layers` always get the same input, and are called by `column_parallel` or `gated_unit` only."""
    for layer in layers:
        layer.together = layers


def column_parallel(
    x: Tensor, layers: Sequence[ColumnParallelLinear], slices: TokenSlices | None = None
) -> Sequence[Tensor]:
    """Each layer's output for one input x, with one all-gather of x and one reduction of dx for all layers.

    With tp > 1, in fp8, and where the engine keeps gradient sums, the weights are read without calling their layers'
    forward. An engine that gathers weights in forward hooks must gather a whole block at once (ZeRO 3's leaf modules,
    `partition_parameters` of engine.deepspeed.adapter).
    """
    axis, weights = layers[0].axis, [layer.weight for layer in layers]
    shape, rows = _tokens(x, slices)
    if layers[0].weight_scale is not None:
        return [float8_linear(x, layer.weight, layer.weight_scale) for layer in layers]
    if layers[0].in_fp8():
        outs = float8_products.columns(x.flatten(0, -2), weights, layers[0].float8, axis, rows)
    elif axis.size > 1:
        outs = column_products(x.flatten(0, -2), weights, axis.name, rows)
    elif len(layers) > 1 and gradient_sum(weights[0]) is None:
        return [layer(x) for layer in layers]
    else:
        return linear(x, weights)
    return [out.unflatten(0, shape) for out in outs]


def gated_unit(
    x: Tensor,
    gate: ColumnParallelLinear,
    value: ColumnParallelLinear,
    out: RowParallelLinear,
    act: str,
    slices: TokenSlices | None = None,
) -> Tensor:
    """out(act(gate x) * value x). gate and value `share_input`."""
    if not out.in_fp8():
        return out(sglu(*column_parallel(x, (gate, value), slices), act), slices)
    shape, rows = (x.shape[:-1], 0) if slices is None else ((-1,), slices.rows)
    weights = gate.weight, value.weight, out.weight
    y = float8_products.gated_unit(x.flatten(0, -2), weights, (gate.float8, out.float8), out.axis, rows, act)
    return y.unflatten(0, shape)


def _tokens(x: Tensor, slices: TokenSlices | None) -> tuple[Sequence[int], int]:
    """Dimensions of x whose rows are tokens, once slices are gathered; and the tokens of all slices, 0 without."""
    return (x.shape[:-1], 0) if slices is None else (slices.shape, slices.rows)


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
        kept = self.weight_scale is not None
        if self.axis.size == 1 and not self.in_fp8():
            y = float8_linear(x, self.weight, self.weight_scale) if kept else linear(x, [self.weight])[0]
            return y if beside is None else (y, beside)
        shape, rows = (x.shape[:-1], 0) if slices is None else ((-1,), slices.rows)
        x, flat = x.flatten(0, -2), None if beside is None or self.axis.size == 1 else beside.flatten()
        if kept:
            y = x.new_empty(len(x), len(self.weight))
            summed = summed_over_ranks(x, self._product_into, y, self.axis.name, rows, flat)
        elif self.in_fp8():
            y, summed = float8_products.row(x, self.weight, self.float8, self.axis, rows, flat)
        else:
            y, summed = row_product(x, self.weight, self.axis.name, rows, flat)
        y = y.unflatten(0, shape)
        if beside is None:
            return y
        return y, beside if flat is None else summed.view(y.shape[:-1])

    def _product_into(self, x: Tensor, out: Tensor) -> None:
        out.copy_(float8_linear(x, self.weight, self.weight_scale))
