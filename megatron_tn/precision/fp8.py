"""Matrix products of fp8 operands, for engine.products=fp8: the blocks' linear layers, forward and backward.

    y  = x W^T      x and W in e4m3
    dx = dy W       dy in GRADIENT
    dW = dy^T x     fp32, added to the gradient sum

Each operand has one power-of-two scale, of its current largest element (kernels/quantize). Both operands lie along the
contraction, so x, W and dy are each needed as rows and transposed: x is kept for the backward pass only transposed, at
one byte an element. On a GPU torch._scaled_mm multiplies; elsewhere the same fp8 numbers are multiplied in fp32.

Passes without gradients (evaluation, decoding) use the weights as they are, so that a loss measured during training is
the exported model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.numerics import accumulation_dtype
from kernels.quantize.op import largest, quantize, quantize_
from megatron_tn.device.side_stream import on_side_stream
from megatron_tn.precision.gradient_sum import GradientSum

OPERAND = torch.float8_e4m3fn  # activations and weights
GRADIENT = torch.float8_e5m2  # gradients of activations
OLDEST_CAPABILITY = (9, 0)  # Hopper


class Float8(NamedTuple):
    """x [T, C] = scale * data: rows [T, C'], transposed [C', T'] (zero-padded, see kernels.quantize), scale fp32 [1].
    One of rows and transposed may be empty. shape: (T, C)."""

    rows: Tensor
    transposed: Tensor
    scale: Tensor
    shape: tuple[int, int]


def quantized(
    x: Tensor, dtype: torch.dtype, *, rows: bool = True, transposed: bool = True, bits: Tensor | None = None
) -> Float8:
    """x [T, C] in fp8. bits: the result of `largest` of x, or of a tensor that x is a part of."""
    bits = largest(x) if bits is None else bits
    return Float8(*quantize(x, bits, dtype, rows=rows, transposed=transposed), tuple(x.shape))


def scaled_product(
    a: Tensor, b: Tensor, scales: tuple[Tensor, Tensor], columns: int, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """a b^T [M, columns] in `dtype`, times both scales; written to `out` if given. a [M, K] and b [N >= columns, K] in
    fp8."""
    if not a.is_cuda:
        wide = accumulation_dtype(dtype)
        y = (a.to(wide) @ b[:columns].to(wide).t() * (scales[0] * scales[1])).to(dtype)
        return y if out is None else out.copy_(y)
    if not len(a):  # a slice of padding alone
        return out if out is not None else torch.empty(0, columns, dtype=dtype, device=a.device)
    into = {"out": out} if out is not None and columns == b.shape[0] else {}
    y = torch._scaled_mm(a, b.t(), *scales, out_dtype=dtype, use_fast_accum=True, **into)
    if into or columns == b.shape[0]:
        return y if out is None or into else out.copy_(y)
    return y[:, :columns].contiguous() if out is None else out.copy_(y[:, :columns])


def forward_product(x: Float8, weight: Float8, dtype: torch.dtype) -> Tensor:
    """y = x W^T [T, out] in `dtype`."""
    return scaled_product(x.rows, weight.rows, (x.scale, weight.scale), weight.shape[0], dtype)


def input_gradient(
    gradients: Sequence[Float8], weights: Sequence[Float8], dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """dx = sum over i of dy_i W_i [T, in] in `dtype`; written to `out` if given."""
    for index, (dy, weight) in enumerate(zip(gradients, weights, strict=True)):
        operands = (dy.rows, weight.transposed, (dy.scale, weight.scale), weight.shape[1], dtype)
        if not index:
            out = scaled_product(*operands, out)
        else:
            out.add_(scaled_product(*operands))
    return out


def weight_gradient(sum: GradientSum | None, dy: Float8, x: Float8, dtype: torch.dtype) -> Tensor | None:
    """dW = dy^T x [out, in] in `dtype` for autograd; with a `sum`: sum += dW in fp32, and None for autograd."""
    outs, ins = dy.shape[1], x.shape[1]
    operands = (dy.transposed[:outs], x.transposed, (dy.scale, x.scale), ins)
    if sum is None:
        return scaled_product(*operands, dtype)
    with on_side_stream(dy.transposed, x.transposed, dy.scale, x.scale):
        if sum.empty:
            scaled_product(*operands, sum.value.dtype, sum.value)
        else:
            sum.value.add_(scaled_product(*operands, sum.value.dtype))
    sum.empty = False
    return None


class Float8Weight:
    """What a linear layer holds beside its weight [out, in] for fp8 products.

    Engines whose weights stay on the device call `keep` after each change of them, once a step; microbatches and
    recomputation then share the operand. Where weights are gathered for a block and freed (ZeRO 3, FSDP2), `of`
    quantises what was gathered.
    """

    def __init__(self) -> None:
        self.kept: Float8 | None = None

    @torch.no_grad()
    def keep(self, weight: Tensor) -> None:
        """Quantise `weight` into the operand that `of` returns from now on; its memory stays at the same addresses."""
        if self.kept is None:
            self.kept = quantized(weight, OPERAND)
        else:
            quantize_(weight, largest(weight), *self.kept[:3])

    def of(self, weight: Tensor, *, rows: bool = False, transposed: bool = False) -> Float8:
        """The operand, with the order that is wanted."""
        return self.kept or quantized(weight, OPERAND, rows=rows, transposed=transposed)


class _Linear(torch.autograd.Function):
    """x [T, in], weights W_i [out_i, in] -> x W_i^T for each i; backward adds dW_i to sums[i]."""

    @staticmethod
    def forward(ctx, x: Tensor, float8: list[Float8Weight], sums: list[GradientSum | None], *weights: Tensor):
        operand = quantized(x, OPERAND)
        ctx.save_for_backward(operand.transposed, operand.scale, *weights)
        ctx.float8, ctx.sums, ctx.shape, ctx.dtype = float8, sums, operand.shape, x.dtype
        return tuple(
            forward_product(operand, held.of(weight, rows=True), x.dtype)
            for held, weight in zip(float8, weights, strict=True)
        )

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        transposed, scale, *weights = ctx.saved_tensors
        x = Float8(transposed, transposed, scale, ctx.shape)
        dys = [quantized(gradient, GRADIENT) for gradient in gradients]
        dx = None
        if ctx.needs_input_grad[0]:
            operands = [held.of(w, transposed=True) for held, w in zip(ctx.float8, weights, strict=True)]
            dx = input_gradient(dys, operands, ctx.dtype)
        return dx, None, None, *(weight_gradient(sum, dy, x, ctx.dtype) for sum, dy in zip(ctx.sums, dys, strict=True))


def linear(
    x: Tensor, weights: Sequence[Tensor], float8: Sequence[Float8Weight], sums: Sequence[GradientSum | None]
) -> list[Tensor]:
    """`precision.matmul.linear` by fp8 products. x [.., in]."""
    outs = _Linear.apply(x.flatten(0, -2), list(float8), list(sums), *weights)
    return [out.unflatten(0, x.shape[:-1]) for out in outs]
