"""The definition of SimpleRMSNorm (arXiv 2307.14995, equation 12), differentiable by autograd, in the input's type."""

import torch
from torch import Tensor


def simple_rms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)
