"""The definition of SimpleRMSNorm (arXiv 2307.14995, equation 12), differentiable by autograd, in the inputs' type."""

import torch
from torch import Tensor


def simple_rms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)


def rms_scaled(x: Tensor, square_sum: Tensor, width: int, eps: float = 1e-6) -> Tensor:
    """x [..., D] / sqrt(square_sum [...] / width + eps): x normalised by a given sum of squares."""
    return x / torch.sqrt(square_sum / width + eps).unsqueeze(-1)
