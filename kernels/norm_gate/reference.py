"""The definition of the norm over all heads and the gate, differentiable by autograd, in the inputs' type."""

import torch
from torch import Tensor


def norm_gate(o: Tensor, u: Tensor, eps: float = 1e-6) -> Tensor:
    """What gate_with_square_sum and apply_rms_scale make together when one rank holds the whole width."""
    return o / torch.sqrt(o.square().mean(-1, keepdim=True) + eps) * u


def rms_scale(y: Tensor, square_sum: Tensor, width: int, eps: float = 1e-6) -> Tensor:
    """What apply_rms_scale makes."""
    return y / torch.sqrt(square_sum / width + eps).unsqueeze(-1)
