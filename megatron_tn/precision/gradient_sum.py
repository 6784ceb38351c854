"""A parameter's fp32 gradient sum over the microbatches of a step, accumulated inside the weight-gradient product.

By autograd, dW = dy^T x is rounded to the weight's type, stored, read again, cast to fp32 and added to an fp32 sum: 12
bytes of traffic an element in bf16, and 4 to clear the sum. Accumulated in the product's epilogue, dW costs 4 bytes
(first microbatch) or 8 and is never rounded to bf16. Megatron-LM calls this gradient accumulation fusion, and the sum
`main_grad`.
"""

import torch
from torch import Tensor

from megatron_tn.device.side_stream import on_side_stream


class GradientSum:
    """value: fp32, of the parameter's shape. empty: True until the first addition of a step.

    The memory of an empty sum is uninitialised: the first addition overwrites it, so no kernel clears it. Only
    gradients/accumulator.py creates sums and resets `empty` to True.
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
        """value += gradient x factor. gradient: fp32, of value's shape; factor: [], on value's device."""
        if self.empty:
            torch.mul(gradient, factor, out=self.value)
        else:
            self.value.addcmul_(gradient, factor)
        self.empty = False

    def begun(self) -> Tensor:
        """`value`, zeroed if the sum was empty, for a kernel that adds to `value` in place."""
        if self.empty:
            self.value.zero_()
        self.empty = False
        return self.value

    def add_product(self, dy: Tensor, x: Tensor) -> None:
        """value [out, in] += dy^T x, in one fused product. dy [T, out] and x [T, in], of the same type."""
        dy = dy.t()
        if x.dtype != self.value.dtype and not x.is_cuda:
            self.add(dy @ x)  # torch.mm has no bf16 -> fp32 product on a CPU
            return
        into = {"out": self.value} if x.dtype == self.value.dtype else {"out": self.value, "out_dtype": torch.float32}
        with on_side_stream(dy, x):
            if self.empty:
                torch.mm(dy, x, **into)
            else:
                # Not value.addmm_(dy, x): PyTorch's FLOP counter does not count addmm_.
                torch.addmm(self.value, dy, x, **into)
        self.empty = False


def gradient_sum(parameter: Tensor) -> GradientSum | None:
    """The sum to which an operator must add its gradient of `parameter`; None: return the gradient to autograd.

    None if the engine has no `GradientAccumulator`, while the parameter has a gradient hook (training/diagnose.py), and
    under torch.compile, which cannot trace a write to a tensor outside its graph.
    """
    if torch.compiler.is_compiling() or parameter._backward_hooks:
        return None
    return getattr(parameter, "gradient_sum", None)
