"""Feature maps of the queries and keys, elementwise (arXiv 2307.14995, section 3.1.2)."""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Activation(NamedTuple):
    """x -> function(x), and its derivative at x."""

    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor | float]


def _silu_derivative(x: Tensor) -> Tensor:
    sigmoid = x.sigmoid()
    return sigmoid * (1 + x * (1 - sigmoid))


ACTIVATIONS = {
    "none": Activation(lambda x: x, lambda x: 1.0),
    "silu": Activation(F.silu, _silu_derivative),
    "1+elu": Activation(lambda x: 1 + F.elu(x), lambda x: x.clamp(max=0).exp()),
    "relu": Activation(F.relu, lambda x: (x > 0).to(x.dtype)),
}
NAMES = tuple(ACTIVATIONS)
