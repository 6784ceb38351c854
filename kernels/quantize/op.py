"""Quantisation to fp8 with one power-of-two scale a tensor: x = scale * data, both orders of data in one pass.

Matrix products of Hopper's tensor cores read both fp8 operands along the contraction. So x [T, C] is written as rows
[T, C'] for y = x W^T and transposed [C', T'] for dW = dy^T x, where C' and T' are C and T rounded up to MULTIPLE, which
such products also need; the padding is zero. The scale stays on the device. `reference` defines it.

NaN and infinity: if x has one, the scale is NaN, so that every product with x is NaN. A cast alone would lose them:
infinity saturates at the largest fp8 number, and a floating-point maximum may drop NaN. With the scale of a bound, an
element above it becomes NaN.
"""

import torch
from torch import Tensor

from kernels import dispatch
from kernels.quantize import reference

MULTIPLE = 16
TYPES = tuple(reference.SHIFTS)  # e4m3, e5m2


def padded(length: int) -> int:
    """length, rounded up to MULTIPLE."""
    return -(-length // MULTIPLE) * MULTIPLE


def largest(x: Tensor) -> Tensor:
    """x [...] of any floating type -> int32 [n], the bits of max |x| of n parts of x as fp32 numbers. Their maximum is
    the whole's: more than infinity's bits if x has a NaN."""
    return torch.ops.megatron_tn.largest(x)


def note_plainly(x: Tensor, bits: Tensor) -> None:
    """Write `largest` of x to bits, int32 [n] of zeros, unless empty: for operators whose kernels note it."""
    if bits.numel():
        bits[0] = largest(x).amax()


def quantize(
    x: Tensor, largest: Tensor, dtype: torch.dtype, *, rows: bool = True, transposed: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, C] of any floating type -> (rows [T, C'], transposed [C', T'], scale fp32 [1]), in fp8 `dtype`.

    largest: int32 [n] from `largest` of x, or bits of any bound of |x|. rows, transposed: whether each is wanted; an
    empty tensor takes the place of the other. Raises ValueError for another type or number of dimensions.
    """
    if dtype not in TYPES or x.dim() != 2 or not torch.is_floating_point(x):
        raise ValueError(f"x.shape={tuple(x.shape)}, {x.dtype} to {dtype}: x must be [T, C], dtype one of {TYPES}")
    return torch.ops.megatron_tn.quantize(x, largest, dtype, rows, transposed)


def quantize_(x: Tensor, largest: Tensor, rows: Tensor, transposed: Tensor, scale: Tensor) -> None:
    """`quantize` into existing tensors, of an fp8 type and of its results' shapes."""
    torch.ops.megatron_tn.quantize_(x, largest, rows, transposed, scale)


def transpose(rows: Tensor) -> Tensor:
    """rows [T, C'] in fp8 -> [C', T'], as `quantize` would have transposed them."""
    return torch.ops.megatron_tn.transpose_fp8(rows)


@torch.library.custom_op("megatron_tn::largest", mutates_args=())
def _largest(x: Tensor) -> Tensor:
    if dispatch.choose("quantize", x) == "triton":
        from kernels.quantize import triton_quantize

        return triton_quantize.largest(x.contiguous())
    return reference.largest(x)


@_largest.register_fake
def _largest_fake(x):
    return x.new_empty(1, dtype=torch.int32)


@torch.library.custom_op("megatron_tn::quantize", mutates_args=())
def _quantize(
    x: Tensor, largest: Tensor, dtype: torch.dtype, rows: bool, transposed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    found = _quantize_fake(x, largest, dtype, rows, transposed)
    _write(x, largest, *found)
    return found


@_quantize.register_fake
def _quantize_fake(x, largest, dtype, rows, transposed):
    count, width = x.shape[0], padded(x.shape[1])
    return (
        x.new_empty((count, width) if rows else (0,), dtype=dtype),
        x.new_empty((width, padded(count)) if transposed else (0,), dtype=dtype),
        x.new_empty(1, dtype=torch.float32),
    )


@torch.library.custom_op("megatron_tn::quantize_", mutates_args=("rows", "transposed", "scale"))
def _quantize_in_place(x: Tensor, largest: Tensor, rows: Tensor, transposed: Tensor, scale: Tensor) -> None:
    _write(x, largest, rows, transposed, scale)


@_quantize_in_place.register_fake
def _quantize_in_place_fake(x, largest, rows, transposed, scale):
    return None


def _write(x: Tensor, largest: Tensor, rows: Tensor, transposed: Tensor, scale: Tensor) -> None:
    if dispatch.choose("quantize", x) == "triton":
        from kernels.quantize import triton_quantize

        triton_quantize.quantize(x.contiguous(), largest, rows=rows, transposed=transposed, scale=scale)
        return
    data, found = reference.quantize(x, largest, rows.dtype)
    scale.copy_(found)
    for out, value in ((rows, data), (transposed, data.t())):
        if out.numel():
            # Copies as bytes: a CPU has no kernels for much of fp8.
            out, value = out.view(torch.uint8).zero_(), value.view(torch.uint8)
            out[: value.shape[0], : value.shape[1]].copy_(value)


@torch.library.custom_op("megatron_tn::transpose_fp8", mutates_args=())
def _transpose(rows: Tensor) -> Tensor:
    out = _transpose_fake(rows)
    if dispatch.choose("quantize", rows) == "triton":
        from kernels.quantize import triton_quantize

        triton_quantize.transpose(rows.contiguous(), out)
        return out
    out.view(torch.uint8).zero_()[:, : rows.shape[0]].copy_(rows.view(torch.uint8).t())
    return out


@_transpose.register_fake
def _transpose_fake(rows):
    return rows.new_empty(rows.shape[1], padded(rows.shape[0]))
