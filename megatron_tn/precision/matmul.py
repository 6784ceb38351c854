"""The three matrix products of a linear layer y = x W^T in the computing type. fp8.py has those of fp8 operands.

    forward           y  = x W^T       x [T, in],  W [out, in]  ->  y  [T, out]
    input gradient    dx = dy W        dy [T, out]              ->  dx [T, in]
    weight gradient   dW = dy^T x                               ->  dW [out, in], for autograd or added to a GradientSum

Layers without a collective call `linear`. Layers split over tensor parallel (parallel/products.py) make the same three
products chunk by chunk, beside their collectives. The loss forms its products tile by tile inside its own kernel
(kernels/cross_entropy).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_tn.precision.gradient_sum import GradientSum, gradient_sum


def forward_product(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """y = x W^T [T, out], written to `out` if given."""
    return torch.mm(x, weight.t()) if out is None else torch.mm(x, weight.t(), out=out)


def input_gradient(gradients: Sequence[Tensor], weights: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    """dx = sum over i of dy_i W_i [T, in], for y_i = x W_i^T with a common input x; written to `out` if given."""
    dx = torch.mm(gradients[0], weights[0]) if out is None else torch.mm(gradients[0], weights[0], out=out)
    for gradient, weight in zip(gradients[1:], weights[1:], strict=True):
        torch.addmm(dx, gradient, weight, out=dx)  # not dx.addmm_: PyTorch's FLOP counter does not count it
    return dx


def weight_gradient(sum: GradientSum | None, dy: Tensor, x: Tensor) -> Tensor | None:
    """dW = dy^T x [out, in] for autograd; with a `sum`: sum += dW, and None for autograd."""
    if sum is None:
        return torch.mm(dy.t(), x)
    sum.add_product(dy, x)
    return None


class _Linear(torch.autograd.Function):
    """x [T, in], weights W_i [out_i, in] -> x W_i^T for each i; backward adds dW_i to sums[i]."""

    @staticmethod
    def forward(ctx, x: Tensor, sums: list[GradientSum], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        ctx.sums = sums
        return tuple(forward_product(x, weight) for weight in weights)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        x, *weights = ctx.saved_tensors
        dx = input_gradient(gradients, weights) if ctx.needs_input_grad[0] else None
        return dx, None, *map(weight_gradient, ctx.sums, gradients, [x] * len(weights))


def linear(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """x [.., in], weights W_i [out_i, in] -> x W_i^T [.., out_i] for each i; dx = sum over i of dy_i W_i."""
    sums = [gradient_sum(weight) for weight in weights]
    if None in sums:
        return [F.linear(x, weight) for weight in weights]
    return [out.unflatten(0, x.shape[:-1]) for out in _Linear.apply(x.flatten(0, -2), sums, *weights)]
