"""Matrix-vector products of a decoding step: a weight times one token, with the norm before and the addition after.

One token reads every weight once, so its time is that of the weights' bytes. Each operator is one kernel that reads a
weight once and takes norm, gate and residual addition along. No gradients: decoding alone uses them.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import dispatch
from kernels.numerics import accumulation_dtype
from kernels.sglu.op import ACTS
from kernels.token import reference

MAX_WIDTH = 32768  # K: a program holds one row of the weight in registers


def token_linear(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float | None = None,
    square_sum: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + scale * W x, scale = 1 / sqrt(sum of squares / K + eps): SimpleRMSNorm commutes with W.

    x: [K]; weight: [N, K], contiguous, of x's type. Sums in fp32 (fp64 for fp64); x is not rounded after the norm.
    eps: None for no norm (scale 1). square_sum: [P] fp32, parts whose sum is the sum of squares; None takes the squares
    of x. residual: [N]; None for zero.
    Returns [N] in x's type. Raises ValueError naming the argument that does not fit.
    """
    _check(x, weight)
    if square_sum is not None and (eps is None or square_sum.dim() != 1):
        raise ValueError(f"square_sum of shape {list(square_sum.shape)} must be [P], and needs eps, which is {eps}")
    if residual is not None and (residual.shape != weight.shape[:1] or residual.dtype != x.dtype):
        raise ValueError(
            f"residual is {list(residual.shape)} {residual.dtype}; it must be [{weight.shape[0]}] of {x.dtype}"
        )
    return torch.ops.megatron_tn.token_linear(x, weight, eps, square_sum, residual)


def token_glu(x: Tensor, gate: Tensor, value: Tensor, *, eps: float, act: str = "none") -> Tensor:
    """act(W_1 n) * W_2 n, n = simple_rms_norm(x, eps): the norm, both products and the gate of SGLU.

    x: [K]; gate W_1 and value W_2: [F, K], contiguous, of x's type. act: "none" or "silu".
    Returns [F] in x's type. Raises ValueError naming the argument that does not fit.
    """
    _check(x, gate)
    _check(x, value)
    if gate.shape != value.shape:
        raise ValueError(f"gate.shape={list(gate.shape)} and value.shape={list(value.shape)} must be equal")
    if act not in ACTS:
        raise ValueError(f"act={act!r} is not one of {ACTS}")
    return torch.ops.megatron_tn.token_glu(x, gate, value, eps, act)


@torch.library.custom_op("megatron_tn::token_linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, eps: float | None, square_sum: Tensor | None, residual: Tensor | None) -> Tensor:
    if _backend(x) == "triton":
        from kernels.token import triton_token

        return triton_token.linear(x=x, weight=weight, eps=eps, square_sum=square_sum, residual=residual)
    wide = accumulation_dtype(x.dtype)
    widened = [None if part is None else part.to(wide) for part in (square_sum, residual)]
    y = reference.token_linear(x.to(wide), weight.to(wide), eps=eps, square_sum=widened[0], residual=widened[1])
    return y.to(x.dtype)


@torch.library.custom_op("megatron_tn::token_glu", mutates_args=())
def _glu(x: Tensor, gate: Tensor, value: Tensor, eps: float, act: str) -> Tensor:
    if _backend(x) == "triton":
        from kernels.token import triton_token

        return triton_token.glu(x=x, gate=gate, value=value, eps=eps, act=act)
    wide = accumulation_dtype(x.dtype)
    return reference.token_glu(x.to(wide), gate.to(wide), value.to(wide), eps=eps, act=act).to(x.dtype)


@_linear.register_fake
def _linear_fake(x, weight, eps, square_sum, residual):
    return x.new_empty(weight.shape[0])


@_glu.register_fake
def _glu_fake(x, gate, value, eps, act):
    return x.new_empty(gate.shape[0])


@register_flop_formula(torch.ops.megatron_tn.token_linear)
def _linear_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """2 N K."""
    return 2 * weight_shape[0] * weight_shape[1]


@register_flop_formula(torch.ops.megatron_tn.token_glu)
def _glu_flops(x_shape, gate_shape, value_shape, *args, out_shape=None, **kwargs) -> int:
    """4 F K: two products."""
    return 4 * gate_shape[0] * gate_shape[1]


def _check(x: Tensor, weight: Tensor) -> None:
    if x.dim() != 1 or not torch.is_floating_point(x):
        raise ValueError(f"x.shape={list(x.shape)}, x.dtype={x.dtype} must be [K] of a floating type")
    if weight.dim() != 2 or weight.shape[1] != x.shape[0] or weight.dtype != x.dtype:
        raise ValueError(f"weight is {list(weight.shape)} {weight.dtype}; it must be [N, {x.shape[0]}] of {x.dtype}")
    if not weight.is_contiguous():
        raise ValueError(f"weight of strides {weight.stride()} must be contiguous")


def _backend(x: Tensor) -> str:
    unsupported = None
    if x.dtype == torch.float64:
        unsupported = "its fp32 sums cannot serve float64 inputs"
    elif x.shape[0] > MAX_WIDTH:
        unsupported = f"its programs hold a whole row, and {x.shape[0]} elements are more than {MAX_WIDTH}"
    return dispatch.choose("token products", x, unsupported)
