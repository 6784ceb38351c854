"""The definition of weights in fp8 with a scale a row, and of their product, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

TYPE = torch.float8_e4m3fn
LARGEST = 448.0  # number of e4m3


def quantize_rows(weight: Tensor, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """weight [N, K] of any floating type -> (data [N, K] in e4m3, scale fp32 [N]), weight ~ scale * data.

    scale: the row's largest element / 448, so that none saturates; 1 for a row of zeros. A row with an infinity or a
    NaN has a NaN in every element. largest: fp32 [N], where rows are longer than these parts of them.
    """
    wide = weight.to(torch.float32)
    scale = (wide.abs().amax(1) if largest is None else largest) / LARGEST
    scale = torch.where(scale == 0, 1.0, torch.where(scale.isfinite(), scale, torch.nan))
    return (wide / scale[:, None]).clamp(-LARGEST, LARGEST).to(TYPE), scale


def dequantized(data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """scale * data [N, K] in `dtype`, not rounded in fp32 and fp64."""
    return data.to(dtype) * scale[:, None].to(dtype)


def float8_linear(x: Tensor, data: Tensor, scale: Tensor) -> Tensor:
    """x [T, K] -> scale * (x data^T) [T, N], in the type of x."""
    return F.linear(x, data.to(x.dtype)) * scale.to(x.dtype)
