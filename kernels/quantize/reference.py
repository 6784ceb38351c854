"""The definition of quantisation to fp8 with one power-of-two scale a tensor, in plain PyTorch.

fp8 types: e4m3 (largest number 448 = 1.75 x 2^8) and e5m2 (57344 = 1.75 x 2^15). The scale s is the smallest power of
two >= 2^-126 with max |x| <= s x (largest number). So x / s is exact before it is rounded to fp8, never saturates, and
s times a sum of products is exact. It is found with integer operations on the bits of max |x| as an fp32 number,
because an integer maximum, unlike a floating-point one, keeps NaN and orders it above infinity.
"""

import torch
from torch import Tensor

SHIFTS = {torch.float8_e4m3fn: 8, torch.float8_e5m2: 15}  # exponent of the largest number, whose mantissa is 1.75

INFINITY, NAN, TWO_TO_127 = 0x7F800000, 0x7FC00000, 0x7F000000  # fp32 bits


def largest(x: Tensor) -> Tensor:
    """x [...] -> int32 [1]: the bits of max |x| in fp32; more than those of infinity if x has a NaN."""
    bits = x.detach().to(torch.float32).view(torch.int32) & 0x7FFFFFFF
    return bits.amax().view(1)


def scale_of(largest: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """largest: int32 [n], bits of fp32 numbers -> s and 1 / s, fp32 [1], for the largest of them; NaN if not finite."""
    bits = largest.amax().view(1)
    field = (((bits.long() + 0x1FFFFF) >> 23) - SHIFTS[dtype]).clamp(min=1).int() << 23
    finite = bits < INFINITY
    scale = torch.where(finite, field, NAN).view(torch.float32)
    return scale, torch.where(finite, TWO_TO_127 - field, NAN).view(torch.float32)


def quantize(x: Tensor, largest: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [T, C], largest |x| (see `largest`) -> x / s in `dtype`, and s, fp32 [1]. What is larger becomes NaN."""
    scale, inverse = scale_of(largest, dtype)
    x = x.float() * inverse
    return x.masked_fill(x.abs() > torch.finfo(dtype).max, float("nan")).to(dtype), scale
