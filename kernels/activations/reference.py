"""The definitions, differentiable by autograd, in the input's type: give them fp64."""

import torch

ACTIVATIONS = {
    "none": lambda x: x,
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "1+elu": lambda x: torch.where(x > 0, 1 + x, torch.exp(x.clamp(max=0))),
    "relu": lambda x: torch.where(x > 0, x, 0.0),
}
