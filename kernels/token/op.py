"""Matrix-vector products of a decoding step: a weight times one token, with the norm before and the addition after.

One token reads every weight once, so its time is that of the weights' bytes. Each operator is one kernel that reads a
weight once and takes norm, gate and residual addition along. A weight may be kept in fp8 with a scale a row
(kernels/float8_linear). No gradients: decoding alone uses them.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import dispatch
from kernels.activations.plain import NAMES
from kernels.float8_linear.op import TYPE, obstacle
from kernels.float8_linear.reference import dequantized
from kernels.numerics import accumulation_dtype
from kernels.token import reference

MAX_WIDTH = 32768  # K: a program holds one row of the weight in registers


def token_linear(
    x: Tensor,
    weight: Tensor,
    *,
    weight_scale: Tensor | None = None,
    eps: float | None = None,
    square_sum: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + scale * W x, scale = 1 / sqrt(sum of squares / K + eps): SimpleRMSNorm commutes with W.

    x: [K]; weight: [N, K], contiguous, of x's type, or in e4m3 with weight_scale fp32 [N]: W = weight_scale * weight by
    rows. Sums in fp32 (fp64 for fp64); x is not rounded after the norm.
    eps: None for no norm (scale 1). square_sum: [P] fp32, parts whose sum is the sum of squares; None takes the squares
    of x. residual: [N]; None for zero.
    Returns [N] in x's type. Raises ValueError naming the argument that does not fit.
    """
    _check(x, weight, weight_scale)
    if square_sum is not None and (eps is None or square_sum.dim() != 1):
        raise ValueError(f"square_sum of shape {list(square_sum.shape)} must be [P], and needs eps, which is {eps}")
    if residual is not None and (residual.shape != weight.shape[:1] or residual.dtype != x.dtype):
        raise ValueError(
            f"residual is {list(residual.shape)} {residual.dtype}; it must be [{weight.shape[0]}] of {x.dtype}"
        )
    return torch.ops.megatron_tn.token_linear(x, weight, weight_scale, eps, square_sum, residual)


def token_glu(
    x: Tensor,
    gate: Tensor,
    value: Tensor,
    *,
    eps: float,
    act: str = "none",
    gate_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> Tensor:
    """act(W_1 n) * W_2 n, n = simple_rms_norm(x, eps): the norm, both products and the gate of SGLU.

    x: [K]; gate W_1 and value W_2: [F, K], contiguous, of x's type, or both in e4m3 with their scales fp32 [F], as of
    `token_linear`. act: a name of kernels/activations.
    Returns [F] in x's type. Raises ValueError naming the argument that does not fit.
    """
    _check(x, gate, gate_scale)
    _check(x, value, value_scale)
    if gate.shape != value.shape or gate.dtype != value.dtype:
        raise ValueError(
            f"gate is {list(gate.shape)} {gate.dtype}, value {list(value.shape)} {value.dtype}; they must be alike"
        )
    if act not in NAMES:
        raise ValueError(f"act={act!r} is not one of {NAMES}")
    return torch.ops.megatron_tn.token_glu(x, gate, value, gate_scale, value_scale, eps, act)


@torch.library.custom_op("megatron_tn::token_linear", mutates_args=())
def _linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    eps: float | None,
    square_sum: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    if _backend(x, weight_scale) == "triton":
        from kernels.token import triton_token

        return triton_token.linear(
            x=x, weight=weight, weight_scale=weight_scale, eps=eps, square_sum=square_sum, residual=residual
        )
    wide = accumulation_dtype(x.dtype)
    widened = [None if part is None else part.to(wide) for part in (square_sum, residual)]
    weight = _widened(weight, weight_scale, wide)
    y = reference.token_linear(x.to(wide), weight, eps=eps, square_sum=widened[0], residual=widened[1])
    return y.to(x.dtype)


@torch.library.custom_op("megatron_tn::token_glu", mutates_args=())
def _glu(
    x: Tensor,
    gate: Tensor,
    value: Tensor,
    gate_scale: Tensor | None,
    value_scale: Tensor | None,
    eps: float,
    act: str,
) -> Tensor:
    if _backend(x, gate_scale) == "triton":
        from kernels.token import triton_token

        return triton_token.glu(
            x=x, gate=gate, value=value, gate_scale=gate_scale, value_scale=value_scale, eps=eps, act=act
        )
    wide = accumulation_dtype(x.dtype)
    gate, value = _widened(gate, gate_scale, wide), _widened(value, value_scale, wide)
    return reference.token_glu(x.to(wide), gate, value, eps=eps, act=act).to(x.dtype)


@_linear.register_fake
def _linear_fake(x, weight, weight_scale, eps, square_sum, residual):
    return x.new_empty(weight.shape[0])


@_glu.register_fake
def _glu_fake(x, gate, value, gate_scale, value_scale, eps, act):
    return x.new_empty(gate.shape[0])


@register_flop_formula(torch.ops.megatron_tn.token_linear)
def _linear_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """2 N K."""
    return 2 * weight_shape[0] * weight_shape[1]


@register_flop_formula(torch.ops.megatron_tn.token_glu)
def _glu_flops(x_shape, gate_shape, value_shape, *args, out_shape=None, **kwargs) -> int:
    """4 F K: two products."""
    return 4 * gate_shape[0] * gate_shape[1]


def _widened(weight: Tensor, scale: Tensor | None, wide: torch.dtype) -> Tensor:
    return weight.to(wide) if scale is None else dequantized(weight, scale, wide)


def _check(x: Tensor, weight: Tensor, scale: Tensor | None) -> None:
    if x.dim() != 1 or not torch.is_floating_point(x):
        raise ValueError(f"x.shape={list(x.shape)}, x.dtype={x.dtype} must be [K] of a floating type")
    wanted = x.dtype if scale is None else TYPE
    if weight.dim() != 2 or weight.shape[1] != x.shape[0] or weight.dtype != wanted:
        raise ValueError(f"weight is {list(weight.shape)} {weight.dtype}; it must be [N, {x.shape[0]}] of {wanted}")
    if scale is not None and (scale.shape != weight.shape[:1] or scale.dtype != torch.float32):
        raise ValueError(f"a scale is {list(scale.shape)} {scale.dtype}; it must be [{len(weight)}] of torch.float32")
    for name, part in (("weight", weight), ("a scale", scale)):
        if part is not None and not part.is_contiguous():
            raise ValueError(f"{name} of strides {part.stride()} must be contiguous")


def _backend(x: Tensor, scale: Tensor | None) -> str:
    unsupported = None if scale is None else obstacle(x.device)
    if x.shape[0] > MAX_WIDTH:
        unsupported = f"its programs hold a whole row, and {x.shape[0]} elements are more than {MAX_WIDTH}"
    return dispatch.choose("token products", x, unsupported)
