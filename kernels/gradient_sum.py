"""Where an operator may add a weight's gradient itself, instead of handing it to autograd."""

from typing import Protocol

from torch import Tensor


class GradientSum(Protocol):
    """A sum in fp32, of the weight's shape, over the backward passes of a training step."""

    def add_scaled(self, gradient: Tensor, factor: Tensor) -> None:
        """Add gradient, fp32, times factor, a scalar on its device."""

    def begun(self) -> Tensor:
        """The sum so far, zero where nothing was added, for additions in place."""
