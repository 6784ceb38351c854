"""RoPE's angles base^(-2 j / d) t, without the rounding of an fp32 product, which is 0.004 rad at t = 65 536."""

import functools
import math

import torch
from torch import Tensor

from kernels.numerics import accumulation_dtype


def frequencies(head_dim: int, base: float) -> Tensor:
    """base^(-2 j / d), j = 0 .. d / 2 - 1, in radians per position: fp64 [d / 2] on the CPU."""
    j = torch.arange(head_dim // 2, dtype=torch.float64, device="cpu")
    return base ** (-2 * j / head_dim)


def cos_sin(positions: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [T, 1, d / 2] of the angles at `positions` [T], in the type of sums for inputs of `dtype`."""
    angle = positions[:, None, None] * frequencies(head_dim, base).to(positions.device)
    angle = (angle - (angle / math.tau).round() * math.tau).to(accumulation_dtype(dtype))
    return angle.cos(), angle.sin()


@functools.cache
def turn_fractions(head_dim: int, base: float, device: torch.device) -> Tensor:
    """frequencies / 2 pi as integers in units of 2^-64 turns, int64 [d / 2]: multiplied by an integer position, integer
    overflow drops exactly the whole turns."""
    turns = frequencies(head_dim, base) / math.tau
    turns -= (turns + 0.5).floor()
    return (turns * 2.0**64).to(torch.int64).to(device)
