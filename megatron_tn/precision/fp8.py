"""Matrix products of fp8 operands, for engine.products=fp8: the blocks' linear layers, forward and backward.

    y  = x W^T      x and W in e4m3
    dx = dy W       dy in e5m2
    dW = dy^T x     fp32, added to the gradient sum

Each operand has one power-of-two scale (kernels/quantize), of its current largest element or of a bound. Both operands
lie along the contraction, so x, W and dy are each needed as rows and transposed: x is kept for the backward pass only
transposed, at one byte an element. On a GPU torch._scaled_mm multiplies; elsewhere the same fp8 numbers are multiplied
in fp32. Weights of one input are stacked: one product makes all their outputs, one the sum of their dx.

parallel/float8_products.py makes layers of these, in passes with gradients. Passes without (evaluation, decoding) use
the weights as they are, so that a loss measured during training is the exported model's.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.numerics import accumulation_dtype
from kernels.quantize.many import ManyMatrices, stacked
from kernels.quantize.noted import noted
from kernels.quantize.op import MULTIPLE, largest, padded, quantize, transpose
from megatron_tn.device.side_stream import on_side_stream
from megatron_tn.precision.gradient_sum import GradientSum

OPERAND = torch.float8_e4m3fn  # activations and weights
# Gradients of activations. Those of a few tokens are far larger than all others, which would underflow in e4m3, whose
# normal numbers span 15 binades: errors of weight gradients were 1.5 to 2 times as large (3 layers against fp64).
GRADIENT = torch.float8_e5m2
OLDEST_CAPABILITY = (9, 0)  # Hopper


class Float8(NamedTuple):
    """x [T, C] = scale * data: rows [T, C'], transposed [C', T'] (zero-padded, see kernels.quantize), scale fp32 [1].
    One of rows and transposed may be empty. shape: (T, C)."""

    rows: Tensor
    transposed: Tensor
    scale: Tensor
    shape: tuple[int, int]


def largest_of(x: Tensor) -> Tensor:
    """`kernels.quantize.op.largest` of x, as the kernel that wrote x noted it, or by a search."""
    bits = noted(x)
    return largest(x) if bits is None else bits


def quantized(
    x: Tensor, dtype: torch.dtype, *, rows: bool = True, transposed: bool = True, bits: Tensor | None = None
) -> Float8:
    """x [T, C] in fp8. bits: the result of `kernels.quantize.op.largest` of x, of more than x, or a bound's."""
    bits = largest_of(x) if bits is None else bits
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
    if b.shape[0] % MULTIPLE:
        b = torch.nn.functional.pad(b.view(torch.uint8), (0, 0, 0, padded(len(b)) - len(b))).view(b.dtype)
    whole = columns == b.shape[0]
    into = {"out": out} if whole and out is not None and out.data_ptr() % 16 == 0 else {}
    # Fast accumulation: of 16384 terms its error is 1.6e-3, where rounding to fp8 leaves 3.8e-2.
    y = torch._scaled_mm(a, b.t(), *scales, out_dtype=dtype, use_fast_accum=True, **into)
    if into or (whole and out is None):
        return y
    return y[:, :columns].contiguous() if out is None else out.copy_(y[:, :columns])


def weight_gradients(
    sums: Sequence[GradientSum | None], widths: Sequence[int], dy: Float8, x: Float8, dtype: torch.dtype
) -> list[Tensor | None]:
    """dW_i = dy_i^T x [out_i, in] of stacked weights, out_i = widths[i]: in `dtype` for autograd, or added to sums[i]
    in fp32, and None for autograd."""
    found, start = [], 0
    for sum, width in zip(sums, widths, strict=True):
        operands = (dy.transposed[start : start + width], x.transposed, (dy.scale, x.scale), x.shape[1])
        start += width
        if sum is None:
            found.append(scaled_product(*operands, dtype))
            continue
        with on_side_stream(dy.transposed, x.transposed, dy.scale, x.scale):
            if sum.empty:
                scaled_product(*operands, sum.value.dtype, sum.value)
            else:
                sum.value.add_(scaled_product(*operands, sum.value.dtype))
        sum.empty = False
        found.append(None)
    return found


class Float8Weights:
    """The weights [out_i, in] of linear layers with a common input, stacked, as an fp8 operand.

    kept: the operand, or its rows alone; set by `KeptWeights`, where weights stay on the device, and shared by
    microbatches. Where weights are gathered for a block and freed (ZeRO 3, FSDP2), `of` quantises them.
    bound: of the input's elements, where one is known; None: the input's scale is of its largest element.
    """

    def __init__(self, bound: float | None = None) -> None:
        self.bound = bound
        self.kept: Float8 | None = None
        self._bits: Tensor | None = None

    def of(self, weights: Sequence[Tensor], *, rows: bool = False, transposed: bool = False) -> Float8:
        """The operand [sum of out_i, in], in the order that is wanted."""
        if self.kept is None:
            return quantized(stacked(weights), OPERAND, rows=rows, transposed=transposed)
        if transposed and not self.kept.transposed.numel():
            return self.kept._replace(transposed=transpose(self.kept.rows))
        return self.kept

    def bits_of_bound(self, x: Tensor) -> Tensor | None:
        """The bound as `kernels.quantize.op.largest` gives a largest element; None without a bound."""
        if self.bound is not None and (self._bits is None or self._bits.device != x.device):
            self._bits = torch.full((1,), self.bound, device=x.device).view(torch.int32)
        return self._bits


class KeptWeights:
    """The operands that several `Float8Weights` keep from step to step, at addresses that do not change.

    shapes: of each one's weights. transposed: whether operands are kept in both orders, two bytes an element, or as
    rows alone, which each backward pass transposes.
    """

    def __init__(
        self,
        held: Sequence[Float8Weights],
        shapes: Sequence[Sequence[torch.Size]],
        device: torch.device,
        *,
        transposed: bool = True,
    ):
        self.matrices = ManyMatrices(shapes, OPERAND, device, transposed=transposed)
        for each, operand, group in zip(held, self.matrices.operands, shapes, strict=True):
            each.kept = Float8(*operand, (sum(shape[0] for shape in group), group[0][1]))

    def quantize(self, weights: Sequence[Sequence[Tensor]]) -> None:
        """Call this after every change of the weights, once a step."""
        self.matrices.quantize_(weights)
