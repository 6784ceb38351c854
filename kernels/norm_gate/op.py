"""Norm over all heads and gate, in two steps with the tensor-parallel reduction between them.

SimpleRMSNorm has no weights, so its scale, one number a token, commutes with the gate and with the output projection:
norm(o) * u W = ((o * u) W) * scale. Each rank forms o * u and the sum of squares of its heads; both reductions done,
the scale is applied.
"""

import torch
from torch import Tensor

from kernels import dispatch
from kernels.numerics import accumulation_dtype, dot

MAX_TRITON_WIDTH = 65536


def gate_with_square_sum(o: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """o, u: [..., D] -> (o * u [..., D] in their type, the sum of o^2 over D [...] in fp32, fp64 for fp64).

    Differentiable in both, through both results. Raises ValueError where shapes or types differ, or do not fit.
    """
    if o.shape != u.shape or o.dtype != u.dtype:
        raise ValueError(
            f"o is {tuple(o.shape)} {o.dtype} and u is {tuple(u.shape)} {u.dtype}; they must be alike in shape and type"
        )
    if o.dim() == 0 or not torch.is_floating_point(o):
        raise ValueError(f"o.shape={tuple(o.shape)}, o.dtype={o.dtype} must be [..., D] of a floating type")
    return torch.ops.megatron_tn.gate_forward(o, u)


def apply_rms_scale(y: Tensor, square_sum: Tensor, width: int, eps: float = 1e-6) -> Tensor:
    """y * rsqrt(square_sum / width + eps), one factor a token, in y's type.

    y: [..., D]; square_sum: [...], fp32 (or fp64); width: over how many elements the squares were summed, all ranks
    together (not y's own width). Differentiable in y and square_sum. Raises ValueError where they do not fit.
    """
    if square_sum.shape != y.shape[:-1]:
        raise ValueError(f"square_sum.shape={tuple(square_sum.shape)} must be y.shape[:-1]={tuple(y.shape[:-1])}")
    if square_sum.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"square_sum.dtype={square_sum.dtype} must be float32: sums of squares overflow or blur below")
    if width < 1 or not eps >= 0:  # NaN is not
        raise ValueError(f"width={width} must be >= 1 and eps={eps} >= 0")
    return torch.ops.megatron_tn.rms_scale_forward(y, square_sum, width, eps)


@torch.library.custom_op("megatron_tn::gate_forward", mutates_args=())
def _gate_forward(o: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    if _backend(o) == "triton":
        from kernels.norm_gate import triton_norm_gate

        return triton_norm_gate.gate_forward(o, u)
    norm = torch.linalg.vector_norm(o, dim=-1, dtype=accumulation_dtype(o.dtype))
    return (o * u).contiguous(), norm.square()


@torch.library.custom_op("megatron_tn::gate_backward", mutates_args=())
def _gate_backward(dy: Tensor, dsquare_sum: Tensor, o: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    if _backend(o) == "triton":
        from kernels.norm_gate import triton_norm_gate

        return triton_norm_gate.gate_backward(dy, dsquare_sum, o, u)
    wide = dsquare_sum.dtype
    do = torch.addcmul(dy.to(wide) * u, o.to(wide), 2 * dsquare_sum.unsqueeze(-1))
    return do.to(o.dtype).contiguous(), (dy * o).contiguous()


@_gate_forward.register_fake
def _gate_forward_fake(o, u):
    return o.new_empty(o.shape), o.new_empty(o.shape[:-1], dtype=accumulation_dtype(o.dtype))


@_gate_backward.register_fake
def _gate_backward_fake(dy, dsquare_sum, o, u):
    return o.new_empty(o.shape), u.new_empty(u.shape)


def _gate_save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gate_differentiate(ctx, dy, dsquare_sum):
    return torch.ops.megatron_tn.gate_backward(dy, dsquare_sum, *ctx.saved_tensors)


_gate_forward.register_autograd(_gate_differentiate, setup_context=_gate_save)


@torch.library.custom_op("megatron_tn::rms_scale_forward", mutates_args=())
def _scale_forward(y: Tensor, square_sum: Tensor, width: int, eps: float) -> Tensor:
    if _backend(y, square_sum) == "triton":
        from kernels.norm_gate import triton_norm_gate

        return triton_norm_gate.scale_forward(y, square_sum, width, eps)
    return (y * _scale(square_sum, width, eps)).to(y.dtype).contiguous()


@torch.library.custom_op("megatron_tn::rms_scale_backward", mutates_args=())
def _scale_backward(dout: Tensor, y: Tensor, square_sum: Tensor, width: int, eps: float) -> tuple[Tensor, Tensor]:
    if _backend(y, square_sum) == "triton":
        from kernels.norm_gate import triton_norm_gate

        return triton_norm_gate.scale_backward(dout, y, square_sum, width, eps)
    scale = _scale(square_sum, width, eps)
    along = dot(dout.to(scale.dtype), y.to(scale.dtype))
    return (dout * scale).to(y.dtype).contiguous(), along * scale.squeeze(-1) ** 3 * (-0.5 / width)


@_scale_forward.register_fake
def _scale_forward_fake(y, square_sum, width, eps):
    return y.new_empty(y.shape)


@_scale_backward.register_fake
def _scale_backward_fake(dout, y, square_sum, width, eps):
    return y.new_empty(y.shape), square_sum.new_empty(square_sum.shape)


def _scale_save(ctx, inputs, output):
    y, square_sum, ctx.width, ctx.eps = inputs
    ctx.save_for_backward(y, square_sum)


def _scale_differentiate(ctx, dout):
    dy, dsquare_sum = torch.ops.megatron_tn.rms_scale_backward(dout, *ctx.saved_tensors, ctx.width, ctx.eps)
    return dy, dsquare_sum, None, None


_scale_forward.register_autograd(_scale_differentiate, setup_context=_scale_save)


def _scale(square_sum: Tensor, width: int, eps: float) -> Tensor:
    """[...] -> [..., 1]"""
    return torch.rsqrt(square_sum / width + eps).unsqueeze(-1)


def _backend(*tensors: Tensor) -> str:
    unsupported = None
    if any(x.dtype == torch.float64 for x in tensors):
        unsupported = "its fp32 sums cannot serve float64 inputs"
    elif tensors[0].shape[-1] > MAX_TRITON_WIDTH:
        unsupported = f"the width {tensors[0].shape[-1]} exceeds {MAX_TRITON_WIDTH}"
    return dispatch.choose("norm_gate", tensors[0], unsupported)
