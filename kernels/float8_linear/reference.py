"""The definition of weights in fp8 with a scale a row, and of their product, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

TYPE = torch.float8_e4m3fn
LARGEST = 448.0  # the largest number of e4m3
LEAST_EXPONENT = -126  # smallest exponent of a scale, a power of two


def quantize_rows(weight: Tensor, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """weight [N, K] of any floating type -> (data [N, K] in e4m3, scale fp32 [N]), weight ~ scale * data.

    scale: the smallest power of two with which no element of the row exceeds 448. So scale * data is exact in bf16, and
    dividing by the scale rounds nothing; e4m3 floats, so a finer scale gains little (trained weights: relative error
    0.0266, with largest / 448 as the scale 0.0258). A row with an infinity or a NaN has a NaN in every element.
    largest: fp32 [N], where rows are longer than these parts of them.
    """
    wide = weight.to(torch.float32)
    largest = wide.abs().amax(1) if largest is None else largest
    mantissa, exponent = torch.frexp(largest / LARGEST)  # mantissa in [1/2, 1)
    exponent = (exponent - (mantissa <= 0.5).int()).clamp(min=LEAST_EXPONENT)
    scale = torch.where(largest.isfinite(), torch.ldexp(torch.ones_like(largest), exponent), torch.nan)
    return (wide / scale[:, None]).clamp(-LARGEST, LARGEST).to(TYPE), scale


def dequantized(data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """scale * data [N, K] in `dtype`."""
    return data.to(dtype) * scale[:, None].to(dtype)


def float8_linear(x: Tensor, data: Tensor, scale: Tensor) -> Tensor:
    """x [T, K] -> x (scale * data)^T [T, N], in the type of x."""
    return F.linear(x, dequantized(data, scale, x.dtype))
