"""Layers of fp8 products (precision/fp8.py), with weights split over tensor-parallel ranks as in parallel/products.py.

    columns       y_i = X W_i^T                            q, k, v, u; layers with a common input
    row           Y = sum over ranks of x W^T              the token mixer's output
    gated_unit    Y = row(act(y_1) y_2), y = columns(X)    SGLU

Slices of tokens and the overlap with collectives are those of parallel/products.py. Where tokens are gathered, each
rank quantises its slice by the largest element of all slices (one integer a rank is reduced first; none where a bound
is known), so that all tokens have one scale, and the gather carries fp8, half the bytes of bf16. The whole is
transposed after the gather. Sums over ranks stay in the computing type. With one rank there are no collectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.quantize.op import transpose
from kernels.sglu.op import sglu_pair_backward, sglu_pair_forward
from megatron_tn.parallel.context import Axis
from megatron_tn.parallel.float8_operators import column_forward, row_backward, row_forward
from megatron_tn.parallel.products import collectives, start_sum_of_gradients
from megatron_tn.precision.fp8 import (
    GRADIENT,
    OPERAND,
    Float8,
    Float8Weights,
    largest_of,
    quantized,
    scaled_product,
    weight_gradients,
)
from megatron_tn.precision.gradient_sum import GradientSum, gradient_sum


class Layer(NamedTuple):
    """Linear layers with a common input, and how they are split. rows: tokens of all slices; 0: no slices."""

    held: Float8Weights
    sums: list[GradientSum | None]
    axis: Axis
    rows: int

    @classmethod
    def of(cls, weights: Sequence[Tensor], held: Float8Weights, axis: Axis, rows: int) -> Layer:
        return cls(held, [gradient_sum(weight) for weight in weights], axis, rows)


class Input(NamedTuple):
    """x [T or S, in] of a product, for its backward pass: transposed [in', T'], or where tokens are gathered this
    rank's rows [S, in']; its scale."""

    kept: Tensor
    scale: Tensor


def columns(x: Tensor, weights: Sequence[Tensor], held: Float8Weights, axis: Axis, rows: int = 0) -> Sequence[Tensor]:
    """x [T, in], or this rank's slice [S, in] of `rows` tokens -> x W_i^T [T or rows, out_i] for each i."""
    y = _Columns.apply(x, Layer.of(weights, held, axis, rows), *weights)
    # The gradient of a split is a copy, even of one part.
    return [y] if len(weights) == 1 else y.split([len(weight) for weight in weights], dim=-1)


def row(
    x: Tensor, weight: Tensor, held: Float8Weights, axis: Axis, rows: int = 0, beside: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`parallel.products.row_product`."""
    return _Row.apply(x, Layer.of([weight], held, axis, rows), beside, weight)


def gated_unit(
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    held: tuple[Float8Weights, Float8Weights],
    axis: Axis,
    rows: int,
    act: str,
) -> Tensor:
    """W_3 (act(W_1 x) * W_2 x). held: of W_1 and W_2, stacked; of W_3."""
    first = Layer.of(weights[:2], held[0], axis, rows)
    return _GatedUnit.apply(x, first, Layer.of(weights[2:], held[1], axis, rows), act, *weights)


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, layer: Layer, *weights: Tensor) -> Tensor:
        y, saved = _columns_forward(x, layer, weights)
        ctx.save_for_backward(*saved, *weights)
        ctx.layer, ctx.shape, ctx.dtype = layer, x.shape, x.dtype
        return y

    @staticmethod
    def backward(ctx, gradient: Tensor):
        kept, scale, *weights = ctx.saved_tensors
        dy = quantized(gradient, GRADIENT)
        dx, dweights = _columns_backward(dy, Input(kept, scale), ctx.layer, weights, ctx.dtype)
        return dx, None, *dweights


class _Row(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, layer: Layer, beside: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        y, summed, saved = _row_forward(x, None, layer, weight, beside)
        ctx.save_for_backward(*saved, weight)
        ctx.layer, ctx.shape, ctx.dtype, ctx.has_beside = layer, x.shape, x.dtype, beside is not None
        return y, summed

    @staticmethod
    def backward(ctx, gradient: Tensor, beside: Tensor):
        kept, scale, weight = ctx.saved_tensors
        dx, dweight, beside = _row_backward(
            gradient, beside, Input(kept, scale), ctx.layer, weight, ctx.shape, ctx.dtype
        )
        return dx, None, beside if ctx.has_beside else None, dweight


class _GatedUnit(torch.autograd.Function):
    """The gated product and its gradient find the largest element as they write; both halves of the gradient are one
    operand."""

    @staticmethod
    def forward(ctx, x: Tensor, first: Layer, second: Layer, act: str, *weights: Tensor) -> Tensor:
        pair, saved = _columns_forward(x, first, weights[:2])
        product, bits = sglu_pair_forward(pair, act)
        y, _, inner = _row_forward(product, bits, second, weights[2], None)
        ctx.save_for_backward(*saved, pair, *inner, *weights)
        ctx.layers, ctx.act, ctx.shape, ctx.dtype = (first, second), act, product.shape, x.dtype
        return y

    @staticmethod
    def backward(ctx, gradient: Tensor):
        kept, scale, pair, inner, inner_scale, *weights = ctx.saved_tensors
        first, second = ctx.layers
        none = gradient.new_empty(0)
        dproduct, dweight, _ = _row_backward(
            gradient, none, Input(inner, inner_scale), second, weights[2], ctx.shape, ctx.dtype
        )
        dpair, bits = sglu_pair_backward(dproduct, pair, ctx.act)
        del dproduct
        dy = quantized(dpair, GRADIENT, bits=bits)
        del dpair
        dx, dweights = _columns_backward(dy, Input(kept, scale), first, weights[:2], ctx.dtype)
        return dx, None, None, None, *dweights, dweight


def _columns_forward(x: Tensor, layer: Layer, weights: Sequence[Tensor]) -> tuple[Tensor, Input]:
    """[T or rows, sum of out_i]."""
    held, _, axis, rows = layer
    bits = held.bits_of_bound(x)
    if rows and bits is None:
        bits = _largest_of_slices(x, axis)
    operand = quantized(x, OPERAND, transposed=not rows, bits=bits)
    weight = held.of(weights, rows=True)
    y = column_forward(
        operand.rows, operand.scale, weight.rows, weight.scale, weight.shape[0], axis.name, rows, x.dtype
    )
    return y, Input(operand.rows if rows else operand.transposed, operand.scale)


def _columns_backward(
    dy: Float8, x: Input, layer: Layer, weights: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, list[Tensor | None]]:
    """dx and the weights' gradients, of dy [T or rows, sum of out_i]."""
    held, sums, axis, rows = layer
    kept = x.kept
    if rows:
        whole = collectives.all_gather_into_tensor(kept.view(torch.uint8), axis.size, axis.name)
    weight = held.of(weights, transposed=True)
    width = weight.shape[1]
    dx = scaled_product(dy.rows, weight.transposed, (dy.scale, weight.scale), width, dtype)
    if axis.size > 1:
        dx = start_sum_of_gradients(dx, axis.name, rows)
    if rows:
        kept = transpose(collectives.wait_tensor(whole)[:rows].view(OPERAND))
    operand = Float8(kept, kept, x.scale, (dy.shape[0], width))
    dweights = weight_gradients(sums, [len(weight) for weight in weights], dy, operand, dtype)
    return collectives.wait_tensor(dx) if axis.size > 1 else dx, dweights


def _row_forward(
    x: Tensor, bits: Tensor | None, layer: Layer, weight: Tensor, beside: Tensor | None
) -> tuple[Tensor, Tensor, Input]:
    """y [T or S, out], the sum of `beside` over ranks, and what the backward pass keeps. bits: of x, where known."""
    held, _, axis, rows = layer
    x8, w8 = quantized(x, OPERAND, bits=bits), held.of([weight], rows=True)
    operands = (x8.rows, x8.scale, w8.rows, w8.scale, w8.shape[0], axis.name, rows, x.dtype)
    if axis.size == 1:
        y, summed = column_forward(*operands), x.new_empty(0)
    else:
        y, summed = row_forward(*operands, beside)
    return y, summed, Input(x8.transposed, x8.scale)


def _row_backward(
    gradient: Tensor,
    beside: Tensor,
    x: Input,
    layer: Layer,
    weight: Tensor,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """dx [T, in] = shape, the weight's gradient, and the gradient of `beside`."""
    held, sums, axis, rows = layer
    w8 = held.of([weight], transposed=True)
    if rows:
        dy = quantized(gradient, GRADIENT, transposed=False, bits=_largest_of_slices(gradient, axis))
        dx, whole, beside = row_backward(
            dy.rows, dy.scale, beside, w8.transposed, w8.scale, shape[1], axis.name, rows, dtype
        )
        dy = Float8(whole, transpose(whole), dy.scale, (rows, gradient.shape[1]))
    else:  # all tokens on each rank: dy is the gradient of every rank's term, and the same on all
        dy = quantized(gradient, GRADIENT)
        dx = scaled_product(dy.rows, w8.transposed, (dy.scale, w8.scale), shape[1], dtype)
    operand = Float8(x.kept, x.kept, x.scale, tuple(shape))
    (dweight,) = weight_gradients(sums, [len(weight)], dy, operand, dtype)
    return dx, dweight, beside


def _largest_of_slices(x: Tensor, axis: Axis) -> Tensor:
    """`kernels.quantize.op.largest` over the slices of all ranks; an integer maximum, so NaN stays the largest."""
    return collectives.wait_tensor(collectives.all_reduce(largest_of(x).amax().view(1), "max", axis.name))
