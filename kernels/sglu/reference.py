"""The definition of the gated product, differentiable by autograd, in the inputs' type."""

from torch import Tensor

from kernels.activations.reference import ACTIVATIONS


def sglu(a: Tensor, b: Tensor, act: str = "none") -> Tensor:
    return ACTIVATIONS[act](a) * b
