"""Products of fp8 operands with weights split over tensor-parallel ranks: parallel/products.py with precision/fp8.py.

Column and row products, slices of tokens and the overlap with collectives are those of parallel/products.py. Where
tokens are gathered, each rank quantises its slice by the largest element of all slices (one integer a rank is reduced
first), so that all tokens have one scale, and the gather carries fp8, half the bytes of bf16. The whole is transposed
after the gather. Sums over ranks stay in the computing type.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.quantize.op import largest, transpose
from megatron_tn.parallel.context import Axis
from megatron_tn.parallel.products import (
    Gathering,
    collectives,
    resolve,
    slice_length,
    start_sum_of_gradients,
    summed_over_ranks,
)
from megatron_tn.precision.fp8 import (
    GRADIENT,
    OPERAND,
    Float8,
    Float8Weight,
    input_gradient,
    quantized,
    scaled_product,
    weight_gradient,
)
from megatron_tn.precision.gradient_sum import GradientSum, gradient_sum


def column_products(
    x: Tensor, weights: Sequence[Tensor], float8: Sequence[Float8Weight], axis: Axis, rows: int = 0
) -> list[Tensor]:
    """`parallel.products.column_products` by fp8 products."""
    sums = [gradient_sum(weight) for weight in weights]
    return list(_Columns.apply(x, list(float8), sums, axis, rows, *weights))


def row_product(
    x: Tensor, weight: Tensor, float8: Float8Weight, axis: Axis, rows: int = 0, beside: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`parallel.products.row_product` by an fp8 product."""
    return _Row.apply(x, weight, float8, gradient_sum(weight), axis, rows, beside)


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, float8: list[Float8Weight], sums: list[GradientSum | None], axis: Axis, rows: int, *weights
    ):
        operand = quantized(x, OPERAND, transposed=not rows, bits=_largest_of_slices(x, axis) if rows else None)
        ctx.save_for_backward(operand.rows if rows else operand.transposed, operand.scale, *weights)
        ctx.float8, ctx.sums, ctx.axis, ctx.rows = float8, sums, axis, rows
        ctx.shape, ctx.dtype = (rows or x.shape[0], x.shape[1]), x.dtype
        held = [each.of(weight, rows=True) for each, weight in zip(float8, weights, strict=True)]
        return tuple(
            torch.ops.megatron_tn.column_forward_fp8(
                operand.rows,
                operand.scale,
                [each.rows for each in held],
                [each.scale for each in held],
                [each.shape[0] for each in held],
                axis.name,
                rows,
                x.dtype,
            )
        )

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        saved, scale, *weights = ctx.saved_tensors
        group = ctx.axis.name
        if ctx.rows:
            whole = collectives.all_gather_into_tensor(saved.view(torch.uint8), ctx.axis.size, group)
        dys = [quantized(gradient, GRADIENT) for gradient in gradients]
        held = [each.of(weight, transposed=True) for each, weight in zip(ctx.float8, weights, strict=True)]
        dx = start_sum_of_gradients(input_gradient(dys, held, ctx.dtype), group, ctx.rows)
        if ctx.rows:
            saved = transpose(collectives.wait_tensor(whole)[: ctx.rows].view(OPERAND))
        x = Float8(saved, saved, scale, ctx.shape)
        dweights = [weight_gradient(sum, dy, x, ctx.dtype) for sum, dy in zip(ctx.sums, dys, strict=True)]
        return collectives.wait_tensor(dx), None, None, None, None, *dweights


class _Row(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        float8: Float8Weight,
        sum: GradientSum | None,
        axis: Axis,
        rows: int,
        beside: Tensor | None,
    ):
        operand = quantized(x, OPERAND)
        ctx.save_for_backward(operand.transposed, operand.scale, weight)
        ctx.float8, ctx.sum, ctx.axis, ctx.rows, ctx.has_beside = float8, sum, axis, rows, beside is not None
        ctx.shape, ctx.dtype = operand.shape, x.dtype
        held = float8.of(weight, rows=True)
        return torch.ops.megatron_tn.row_forward_fp8(
            operand.rows, operand.scale, held.rows, held.scale, held.shape[0], axis.name, rows, x.dtype, beside
        )

    @staticmethod
    def backward(ctx, gradient: Tensor, beside: Tensor):
        transposed, scale, weight = ctx.saved_tensors
        held = ctx.float8.of(weight, transposed=True)
        if ctx.rows:
            dy = quantized(gradient, GRADIENT, transposed=False, bits=_largest_of_slices(gradient, ctx.axis))
            dx, whole, beside = torch.ops.megatron_tn.row_backward_fp8(
                dy.rows, dy.scale, beside, held.transposed, held.scale, ctx.shape[1], ctx.axis.name, ctx.rows, ctx.dtype
            )
            dy = Float8(whole, transpose(whole), dy.scale, (ctx.rows, gradient.shape[1]))
        else:  # all tokens on each rank: dy is the gradient of every rank's term, and the same on all
            dy = quantized(gradient, GRADIENT)
            dx = input_gradient([dy], [held], ctx.dtype)
        x = Float8(transposed, transposed, scale, ctx.shape)
        dweight = weight_gradient(ctx.sum, dy, x, ctx.dtype)
        return dx, dweight, None, None, None, None, beside if ctx.has_beside else None


def _largest_of_slices(x: Tensor, axis: Axis) -> Tensor:
    """`kernels.quantize.op.largest` over the slices of all ranks; an integer maximum, so NaN stays the largest."""
    return collectives.wait_tensor(collectives.all_reduce(largest(x).amax().view(1), "max", axis.name))


@torch.library.custom_op("megatron_tn::column_forward_fp8", mutates_args=())
def _column_forward(
    x: Tensor,
    scale: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    widths: list[int],
    group: str,
    rows: int,
    dtype: torch.dtype,
) -> list[Tensor]:
    """x [T or S, in'], weights [out_i', in'] in fp8; widths: out_i -> [T or rows, out_i] in `dtype`."""
    outs = _column_forward_fake(x, scale, weights, scales, widths, group, rows, dtype)
    whole = [(slice(None), x)]
    pieces = Gathering(x.view(torch.uint8), resolve(group), rows) if rows else whole
    for tokens, piece in pieces:
        for out, weight, own in zip(outs, weights, scales, strict=True):
            scaled_product(piece.view(OPERAND), weight, (scale, own), out.shape[1], dtype, out[tokens])
    return outs


@torch.library.custom_op("megatron_tn::row_forward_fp8", mutates_args=())
def _row_forward(
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
    """x [T, in'], weight [width', in'] in fp8; see `parallel.products.row_product`."""
    y, _ = _row_forward_fake(x, scale, weight, weight_scale, width, group, rows, dtype)
    multiply = functools.partial(_product_into, weight=weight, scales=(scale, weight_scale))
    return y, summed_over_ranks(x, multiply, y, group, rows, beside)


@torch.library.custom_op("megatron_tn::row_backward_fp8", mutates_args=())
def _row_backward(
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
        _product_into(piece.view(gradient.dtype), dx[tokens], weight, (scale, weight_scale))
    whole = gathering.whole.view(gradient.dtype)
    return dx, whole, beside.new_empty(0) if small is None else small.wait()


def _product_into(x: Tensor, out: Tensor, weight: Tensor, scales: tuple[Tensor, Tensor]) -> None:
    scaled_product(x, weight, scales, out.shape[1], out.dtype, out)


@_column_forward.register_fake
def _column_forward_fake(x, scale, weights, scales, widths, group, rows, dtype):
    return [x.new_empty(rows or x.shape[0], width, dtype=dtype) for width in widths]


@_row_forward.register_fake
def _row_forward_fake(x, scale, weight, weight_scale, width, group, rows, dtype, beside=None):
    size = slice_length(rows, resolve(group).size()) if rows else x.shape[0]
    y = x.new_empty(size, width, dtype=dtype)
    return y, y.new_empty(0) if beside is None else beside.new_empty(size)


@_row_backward.register_fake
def _row_backward_fake(gradient, scale, beside, weight, weight_scale, width, group, rows, dtype):
    dx, whole = gradient.new_empty(rows, width, dtype=dtype), gradient.new_empty(rows, gradient.shape[1])
    return dx, whole, beside.new_empty(rows if beside.numel() else 0)


@register_flop_formula(torch.ops.megatron_tn.column_forward_fp8)
def _column_flops(x_shape, scale_shape, weight_shapes, scale_shapes, widths, group, rows, *args, out_shape=None, **kw):
    return sum(2 * (rows or x_shape[0]) * width * x_shape[1] for width in widths)


@register_flop_formula(torch.ops.megatron_tn.row_forward_fp8)
def _row_flops(x_shape, scale_shape, weight_shape, weight_scale_shape, width, *args, out_shape=None, **kwargs) -> int:
    return 2 * x_shape[0] * width * x_shape[1]


@register_flop_formula(torch.ops.megatron_tn.row_backward_fp8)
def _row_backward_flops(
    gradient_shape, scale_shape, beside_shape, weight_shape, weight_scale_shape, width, group, rows, *args, **kwargs
) -> int:
    return 2 * rows * width * gradient_shape[1]
