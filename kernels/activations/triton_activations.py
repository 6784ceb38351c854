"""Activation functions and their derivatives in Triton, fp32."""

import triton
import triton.language as tl

ACTIVATIONS = {"none": 0, "silu": 1, "1+elu": 2, "relu": 3}
SILU = tl.constexpr(1)
ONE_PLUS_ELU = tl.constexpr(2)
RELU = tl.constexpr(3)


@triton.jit
def sigmoid(x, QUICK: tl.constexpr):
    if QUICK:  # one instruction with relative error 2^-11, less than bf16 rounding
        half = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x * 0.5], dtype=tl.float32, is_pure=True, pack=1
        )
        return 0.5 * half + 0.5
    else:
        return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(x, ACT: tl.constexpr, QUICK: tl.constexpr):
    """The activation of x, fp32."""
    if ACT == SILU:
        return x * sigmoid(x, QUICK)
    elif ACT == ONE_PLUS_ELU:
        return tl.where(x > 0, 1.0 + x, tl.exp(tl.minimum(x, 0.0)))
    elif ACT == RELU:
        return tl.where(x > 0, x, 0.0)
    else:
        return x


@triton.jit
def slope(x, ACT: tl.constexpr, QUICK: tl.constexpr):
    """The activation's derivative at x, fp32."""
    if ACT == SILU:
        s = sigmoid(x, QUICK)
        return s * (1.0 + x * (1.0 - s))
    elif ACT == ONE_PLUS_ELU:
        return tl.where(x > 0, 1.0, tl.exp(tl.minimum(x, 0.0)))
    elif ACT == RELU:
        return tl.where(x > 0, 1.0, 0.0)
    else:
        return 1.0
