"""The definition of RoPE, differentiable by autograd: channels j and j + d / 2 of a head are one complex number."""

import torch
from torch import Tensor


def rope(x: Tensor, positions: Tensor, *, head_dim: int, base: float = 10000.0) -> Tensor:
    """x [B, T, H d] in fp64 -> rotated by e^(i t base^(-2 j / d))."""
    a, b = x.unflatten(-1, (-1, 2, head_dim // 2)).unbind(-2)
    j = torch.arange(head_dim // 2, device=x.device, dtype=torch.float64)
    angle = positions[:, None, None] * base ** (-2 * j / head_dim)
    turned = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)
    return torch.stack((turned.real, turned.imag), dim=-2).flatten(-3)
