"""Gradients summed where the optimizer reads them: in fp32, by the products that make them.

A weight's gradient dy^T x is a matrix product. Written by autograd, it is rounded to the weight's type, stored, read
again, widened and added to an fp32 sum: 12 bytes of traffic a parameter in bf16, and 4 to clear the sum. As the
product's own epilogue the sum takes 4 (the first microbatch) or 8, and sees no rounding. Megatron-LM calls this
gradient accumulation fusion, and the tensor `main_grad`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_tn.parallel.beside import beside


class MainGradient:
    """A parameter's gradient over the microbatches of a step, in `sum`, fp32, of the parameter's shape.

    What `sum` holds before the first addition of a step is not looked at, so nobody need clear it.
    """

    def __init__(self, sum: Tensor):
        self.sum = sum
        self.empty = True

    def add(self, gradient: Tensor) -> None:
        """gradient: of sum's shape, any floating type."""
        if self.empty:
            self.sum.copy_(gradient)
        else:
            self.sum.add_(gradient)
        self.empty = False

    def add_scaled(self, gradient: Tensor, factor: Tensor) -> None:
        """gradient: fp32, of sum's shape; factor: a scalar on its device. Adds their product."""
        if self.empty:
            torch.mul(gradient, factor, out=self.sum)
        else:
            self.sum.addcmul_(gradient, factor)
        self.empty = False

    def begun(self) -> Tensor:
        """The sum so far, zero where nothing was added, for additions in place."""
        if self.empty:
            self.sum.zero_()
        self.empty = False
        return self.sum

    def add_product(self, dy: Tensor, x: Tensor) -> None:
        """dy [T, out] and x [T, in], of one type: adds dy^T x [out, in]."""
        dy = dy.t()
        if x.dtype != self.sum.dtype and not x.is_cuda:
            self.add(dy @ x)  # a CPU has no product that widens
            return
        options = {"out": self.sum} if x.dtype == self.sum.dtype else {"out": self.sum, "out_dtype": self.sum.dtype}
        with beside(dy, x):
            if self.empty:
                torch.mm(dy, x, **options)
            else:
                # Not sum.addmm_(...), which PyTorch's FLOP counter does not know.
                torch.addmm(self.sum, dy, x, **options)
        self.empty = False

    def finish(self) -> None:
        """The sum is whole, zero where nothing was added; the next addition begins a new one."""
        self.begun()
        self.empty = True


def attach(parameter: nn.Parameter, sum: Tensor) -> MainGradient:
    """Have `parameter`'s gradients added to `sum`, by a product that knows of it (`weight_gradient`), or as soon as
    autograd has one."""
    main = parameter.main_gradient = MainGradient(sum)
    parameter.register_post_accumulate_grad_hook(_take)
    return main


@torch.no_grad()
def _take(parameter: nn.Parameter) -> None:
    if parameter.grad is not None:  # autograd comes by for a gradient that a product took, too
        parameter.main_gradient.add(parameter.grad)
        parameter.grad = None


def main_gradient(weight: Tensor) -> MainGradient | None:
    """Where a product may add its gradient of `weight` itself; None where autograd is to be given it.

    That is where no engine attached anything; where a hook wants to see the gradient; and under a compiler, which
    cannot follow a sum outside its graph.
    """
    if torch.compiler.is_compiling() or weight._backward_hooks:
        return None
    return getattr(weight, "main_gradient", None)


def weight_gradient(main: MainGradient | None, dy: Tensor, x: Tensor) -> Tensor | None:
    """dy^T x, the gradient of W in y [T, out] = x [T, in] W^T, for autograd; None where `main` took it."""
    if main is None:
        return torch.mm(dy.t(), x)
    main.add_product(dy, x)
    return None
