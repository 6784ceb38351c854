"""A buffer to which an operator's backward pass adds a weight's gradient instead of returning it to autograd."""

from typing import Protocol

from torch import Tensor


class GradientSum(Protocol):
    """The fp32 sum of a weight's gradients over the microbatches of a training step, of the weight's shape."""

    def add_scaled(self, gradient: Tensor, factor: Tensor) -> None:
        """Add factor * gradient; gradient: fp32; factor: a scalar tensor on the same device."""

    def begun(self) -> Tensor:
        """The buffer, for in-place addition; zeroed first if nothing was added yet."""
