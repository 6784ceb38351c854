"""A buffer to which an operator adds a weight's gradient itself, instead of returning it to autograd."""

from typing import Protocol

from torch import Tensor


class GradientSum(Protocol):
    """The fp32 sum of a weight's gradients over the microbatches of a training step, of the weight's shape."""

    def add_scaled(self, gradient: Tensor, factor: Tensor) -> None:
        """Add `gradient`, fp32, times `factor`, a scalar tensor on its device."""

    def begun(self) -> Tensor:
        """The buffer itself, zeroed if nothing was added yet, for additions in place."""
