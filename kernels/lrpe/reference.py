"""The definition of LRPE, differentiable by autograd, in the inputs' type: exact in fp64 alone."""

import torch
from torch import Tensor


def lrpe(x: Tensor, theta: Tensor, positions: Tensor) -> Tensor:
    angle = theta[:, 0] * positions[..., None, None].to(theta.dtype)
    return torch.cat((x * torch.cos(angle), x * torch.sin(angle)), dim=-1)
