"""A parameter's gradient sum: fp32, over the microbatches of a step, written by the kernels that make the gradient.

A weight's gradient dW = dy^T x is a matrix product. Left to autograd it is rounded to the weight's type, stored, read
again, widened and added to an fp32 sum: 12 bytes of traffic an element in bf16, and 4 to clear the sum. As the
product's epilogue the sum costs 4 bytes (first microbatch) or 8, and is never rounded to bf16. Megatron-LM calls this
gradient accumulation fusion, and the sum `main_grad`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_tn.device.side_stream import on_side_stream


class GradientSum:
    """`value`, fp32 of the parameter's shape, and whether it is `empty`: nothing has been added in this step.

    An empty sum's memory holds anything; the first addition overwrites it, so nothing need clear it. Only
    gradients/accumulator.py makes sums and sets `empty` back.
    """

    def __init__(self, value: Tensor):
        self.value = value
        self.empty = True

    def add(self, gradient: Tensor) -> None:
        """value += gradient, of value's shape and any floating type."""
        if self.empty:
            self.value.copy_(gradient)
        else:
            self.value.add_(gradient)
        self.empty = False

    def add_scaled(self, gradient: Tensor, factor: Tensor) -> None:
        """value += gradient x factor. gradient: fp32, of value's shape; factor: a scalar on its device."""
        if self.empty:
            torch.mul(gradient, factor, out=self.value)
        else:
            self.value.addcmul_(gradient, factor)
        self.empty = False

    def begun(self) -> Tensor:
        """`value`, zeroed if it was empty, for a kernel that adds to it in place."""
        if self.empty:
            self.value.zero_()
        self.empty = False
        return self.value

    def add_product(self, dy: Tensor, x: Tensor) -> None:
        """value [out, in] += dy^T x, in one product. dy [T, out] and x [T, in], of one type."""
        dy = dy.t()
        if x.dtype != self.value.dtype and not x.is_cuda:
            self.add(dy @ x)  # on a CPU no product takes bf16 and gives fp32
            return
        into = {"out": self.value} if x.dtype == self.value.dtype else {"out": self.value, "out_dtype": torch.float32}
        with on_side_stream(dy, x):
            if self.empty:
                torch.mm(dy, x, **into)
            else:
                # Not value.addmm_(dy, x), which PyTorch's FLOP counter does not know.
                torch.addmm(self.value, dy, x, **into)
        self.empty = False


def gradient_sum(parameter: Tensor) -> GradientSum | None:
    """The sum that an operator must add its gradient of `parameter` to; None where it must hand it to autograd.

    None where the engine keeps no sums; while a hook looks at the parameter's gradient (training/diagnose.py); and
    under a compiler, which cannot trace a write to a tensor outside its graph.
    """
    if torch.compiler.is_compiling() or parameter._backward_hooks:
        return None
    return getattr(parameter, "gradient_sum", None)
