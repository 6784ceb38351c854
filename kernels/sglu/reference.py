"""The definition of the gated product, differentiable by autograd, in the inputs' type."""

import torch
from torch import Tensor


def sglu(a: Tensor, b: Tensor, act: str = "none") -> Tensor:
    return (a * torch.sigmoid(a) if act == "silu" else a) * b
