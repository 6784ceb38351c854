"""SimpleRMSNorm: root-mean-square normalisation without weights."""

import torch
from torch import Tensor

from kernels import dispatch
from kernels.numerics import accumulation_dtype

MAX_TRITON_WIDTH = 65536


def simple_rms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean of x^2 over the last dimension + eps) (arXiv 2307.14995, equation 12).

    x: [..., D] of any floating type; statistics in fp32 (fp64 for fp64), the result in x's type. The backward pass
    recomputes the statistics, so nothing but x is kept. Raises ValueError for eps < 0, no dimension or no float type.
    """
    if x.dim() == 0 or not torch.is_floating_point(x):
        raise ValueError(f"x.shape={tuple(x.shape)}, x.dtype={x.dtype} must be [..., D] of a floating type")
    if eps < 0:
        raise ValueError(f"eps={eps} must be >= 0")
    return torch.ops.megatron_tn.srmsnorm_forward(x, eps)


@torch.library.custom_op("megatron_tn::srmsnorm_forward", mutates_args=())
def _forward(x: Tensor, eps: float) -> Tensor:
    if _backend(x) == "triton":
        from kernels.srmsnorm import triton_norm

        return triton_norm.forward(x, eps)
    return (x * _scale(x, eps)).to(x.dtype, memory_format=torch.contiguous_format)


@torch.library.custom_op("megatron_tn::srmsnorm_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, eps: float) -> Tensor:
    if _backend(x) == "triton":
        from kernels.srmsnorm import triton_norm

        return triton_norm.backward(dy, x, eps)
    scale = _scale(x, eps)
    wide_dy, wide_x = dy.to(scale.dtype), x.to(scale.dtype)
    along = torch.linalg.vecdot(wide_dy, wide_x).unsqueeze(-1)
    dx = torch.addcmul(wide_dy * scale, wide_x, -along * scale**3 / x.shape[-1])
    return dx.to(x.dtype, memory_format=torch.contiguous_format)


@_forward.register_fake
def _forward_fake(x, eps):
    return x.new_empty(x.shape)


@_backward.register_fake
def _backward_fake(dy, x, eps):
    return x.new_empty(x.shape)


def _save(ctx, inputs, output):
    x, ctx.eps = inputs
    ctx.save_for_backward(x)


def _differentiate(ctx, dy):
    return torch.ops.megatron_tn.srmsnorm_backward(dy, *ctx.saved_tensors, ctx.eps), None


_forward.register_autograd(_differentiate, setup_context=_save)


def _scale(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean of x^2 + eps), [..., 1], in the accumulation type."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=accumulation_dtype(x.dtype))
    return torch.rsqrt(norm.square() / x.shape[-1] + eps)


def _backend(x: Tensor) -> str:
    unsupported = None
    if x.dtype == torch.float64:
        unsupported = "its fp32 statistics cannot serve float64 inputs"
    elif x.shape[-1] > MAX_TRITON_WIDTH:
        unsupported = f"the width {x.shape[-1]} exceeds {MAX_TRITON_WIDTH}"
    return dispatch.choose("simple_rms_norm", x, unsupported)
