"""The registered operators of float8_products.py, one node each for selective recomputation and dry runs: products of
fp8 operands beside the collectives of parallel/products.py. Their gradients are taken in float8_products.py."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megatron_tn.parallel.products import Gathering, resolve, slice_length, summed_over_ranks
from megatron_tn.precision.fp8 import scaled_product


@torch.library.custom_op("megatron_tn::column_forward_fp8", mutates_args=())
def column_forward(
    x: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    width: int,
    group: str,
    rows: int,
    dtype: torch.dtype,
) -> Tensor:
    """x [T or S, in'], weight [out', in'] in fp8, out = width -> x weight^T [T or rows, out] in `dtype`."""
    scales = scale, weight_scale
    if not rows:
        return scaled_product(x, weight, scales, width, dtype)
    y = x.new_empty(rows, width, dtype=dtype)
    for tokens, piece in Gathering(x.view(torch.uint8), resolve(group), rows):
        scaled_product(piece.view(x.dtype), weight, scales, width, dtype, y[tokens])
    return y


@torch.library.custom_op("megatron_tn::row_forward_fp8", mutates_args=())
def row_forward(
    x: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    width: int,
    group: str,
    rows: int,
    dtype: torch.dtype,
    beside: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x [T, in'], weight [out', in'] in fp8, out = width; see `parallel.products.row_product`."""

    def multiply(tokens: Tensor, out: Tensor) -> None:
        scaled_product(tokens, weight, (scale, weight_scale), width, dtype, out)

    y = x.new_empty(slice_length(rows, resolve(group).size()) if rows else x.shape[0], width, dtype=dtype)
    return y, summed_over_ranks(x, multiply, y, group, rows, beside)


@torch.library.custom_op("megatron_tn::row_backward_fp8", mutates_args=())
def row_backward(
    gradient: Tensor,
    scale: Tensor,
    beside: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    width: int,
    group: str,
    rows: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """gradient: this rank's slice of dy, [S, out'] in fp8; weight: transposed, [in', out'], in = width. beside: this
    rank's slice of dbeside, [S] or [0]. -> dx [rows, in], dy [rows, out'] in fp8, dbeside [rows] or [0]."""
    ranks = resolve(group)
    gathering = Gathering(gradient.view(torch.uint8), ranks, rows)
    small = Gathering(beside, ranks, rows) if beside.numel() else None
    dx = gradient.new_empty(rows, width, dtype=dtype)
    for tokens, piece in gathering:
        scaled_product(piece.view(gradient.dtype), weight, (scale, weight_scale), width, dtype, dx[tokens])
    whole = gathering.whole.view(gradient.dtype)
    return dx, whole, beside.new_empty(0) if small is None else small.wait()


@column_forward.register_fake
def _column_forward_fake(x, scale, weight, weight_scale, width, group, rows, dtype):
    return x.new_empty(rows or x.shape[0], width, dtype=dtype)


@row_forward.register_fake
def _row_forward_fake(x, scale, weight, weight_scale, width, group, rows, dtype, beside=None):
    size = slice_length(rows, resolve(group).size()) if rows else x.shape[0]
    y = x.new_empty(size, width, dtype=dtype)
    return y, y.new_empty(0) if beside is None else beside.new_empty(size)


@row_backward.register_fake
def _row_backward_fake(gradient, scale, beside, weight, weight_scale, width, group, rows, dtype):
    dx, whole = gradient.new_empty(rows, width, dtype=dtype), gradient.new_empty(rows, gradient.shape[1])
    return dx, whole, beside.new_empty(rows if beside.numel() else 0)


@register_flop_formula(torch.ops.megatron_tn.column_forward_fp8)
def _column_flops(x_shape, scale_shape, weight_shape, weight_scale_shape, width, group, rows, *args, **kwargs) -> int:
    return 2 * (rows or x_shape[0]) * width * x_shape[1]


@register_flop_formula(torch.ops.megatron_tn.row_forward_fp8)
def _row_flops(x_shape, scale_shape, weight_shape, weight_scale_shape, width, *args, **kwargs) -> int:
    return 2 * x_shape[0] * width * x_shape[1]


@register_flop_formula(torch.ops.megatron_tn.row_backward_fp8)
def _row_backward_flops(
    gradient_shape, scale_shape, beside_shape, weight_shape, weight_scale_shape, width, group, rows, *args, **kwargs
) -> int:
    return 2 * rows * width * gradient_shape[1]
