"""RMSNorm, with a learnt weight (arXiv 1910.07467), fused with the residual addition before it."""

import torch
from torch import Tensor

from kernels.numerics import accumulation_dtype
from kernels.rows import backend_of_rows, check_rows


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(s, s / sqrt(mean of s^2 over the last dimension + eps) * weight) with s = x + residual, in one pass.

    x, residual: [..., D], weight: [D], of one floating type. s is rounded to that type before the norm; statistics and
    sums are fp32 (fp64 for fp64). Only s and weight are saved. Raises ValueError for other shapes or types and eps < 0.
    """
    _check(x, weight, eps, residual)
    return torch.ops.megatron_tn.add_rmsnorm_forward(x, residual, weight, eps)


def branch_rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(x, norm of x), where a sublayer branches off the residual stream: one backward kernel computes the gradients of
    the norm and adds the gradient of the first result.

    x: [..., D]. The first result is x itself, under autograd. Raises ValueError as add_rms_norm does.
    """
    _check(x, weight, eps)
    return _Branch.apply(x, weight, eps)


class _Branch(torch.autograd.Function):
    # Not a registered operator, because those may not return an input. The operators that it calls are registered.
    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return x, torch.ops.megatron_tn.rmsnorm_forward(x, weight, eps)

    @staticmethod
    def backward(ctx, dx, dy):
        if dy is None:
            return dx, None, None
        return *torch.ops.megatron_tn.rmsnorm_backward(dx, dy, *ctx.saved_tensors, ctx.eps), None


def _check(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> None:
    check_rows(x, eps, residual)
    if weight.shape != x.shape[-1:] or weight.dtype != x.dtype:
        raise ValueError(f"weight is {tuple(weight.shape)} {weight.dtype}; it must be ({x.shape[-1]},) of {x.dtype}")


@torch.library.custom_op("megatron_tn::rmsnorm_forward", mutates_args=())
def _forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if backend_of_rows("rms_norm", x) == "triton":
        from kernels.rmsnorm import triton_rmsnorm

        return triton_rmsnorm.forward(x=x, residual=None, weight=weight, eps=eps)[1]
    return _normed(x, weight, eps)


@torch.library.custom_op("megatron_tn::add_rmsnorm_forward", mutates_args=())
def _add_forward(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if backend_of_rows("rms_norm", x) == "triton":
        from kernels.rmsnorm import triton_rmsnorm

        return triton_rmsnorm.forward(x=x, residual=residual, weight=weight, eps=eps)
    total = (x + residual).contiguous()
    return total, _normed(total, weight, eps)


@torch.library.custom_op("megatron_tn::rmsnorm_backward", mutates_args=())
def _backward(dtotal: Tensor | None, dy: Tensor, total: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """dtotal: gradient of the sum that is normalised, by its other use; None: it has none. -> dx, dweight."""
    if backend_of_rows("rms_norm", total) == "triton":
        from kernels.rmsnorm import triton_rmsnorm

        return triton_rmsnorm.backward(dtotal=dtotal, dy=dy, total=total, weight=weight, eps=eps)
    wide = accumulation_dtype(total.dtype)
    scale = _scale(total, eps)
    normed, dy = total * scale, dy.to(wide)
    dnormed = dy * weight
    dx = (dnormed - normed * (dnormed * normed).mean(-1, keepdim=True)) * scale
    if dtotal is not None:
        dx = dx + dtotal
    dweight = (dy * normed).flatten(0, -2).sum(0) if dy.dim() > 1 else dy * normed
    return dx.to(total.dtype, memory_format=torch.contiguous_format), dweight.to(weight.dtype)


def _normed(total: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (total * _scale(total, eps) * weight).to(total.dtype, memory_format=torch.contiguous_format)


def _scale(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean of x^2 + eps), [..., 1], in the accumulation type."""
    return torch.rsqrt(x.to(accumulation_dtype(x.dtype)).square().mean(-1, keepdim=True) + eps)


@_forward.register_fake
def _forward_fake(x, weight, eps):
    return x.new_empty(x.shape)


@_add_forward.register_fake
def _add_forward_fake(x, residual, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape)


@_backward.register_fake
def _backward_fake(dtotal, dy, total, weight, eps):
    return total.new_empty(total.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output):
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx, dy):
    return *torch.ops.megatron_tn.rmsnorm_backward(None, dy, *ctx.saved_tensors, ctx.eps), None


def _add_save(ctx, inputs, output):
    _, _, weight, ctx.eps = inputs
    ctx.save_for_backward(output[0], weight)


def _add_differentiate(ctx, dtotal, dy):
    dx, dweight = torch.ops.megatron_tn.rmsnorm_backward(dtotal, dy, *ctx.saved_tensors, ctx.eps)
    return dx, dx, dweight, None


_forward.register_autograd(_differentiate, setup_context=_save)
_add_forward.register_autograd(_add_differentiate, setup_context=_add_save)
