"""The definition of RMSNorm (arXiv 1910.07467), differentiable by autograd, in the inputs' type."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight
