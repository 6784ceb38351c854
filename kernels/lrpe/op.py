"""LRPE, the cosine and sine feature map that gives the first layer its relative positions (arXiv 2307.14995, eq. 4)."""

import math

import torch
from torch import Tensor

from kernels.numerics import accumulation_dtype


def lrpe(x: Tensor, theta: Tensor, positions: Tensor) -> Tensor:
    """[x cos(theta t), x sin(theta t)], which doubles the width.

    x: [B, T, H, d], any floating type and strides. theta: [H, 1, d], radians a position. positions: the t, integers
    (int32 or int64), [T] or [B, T]. Returns [B, T, H, 2d] in x's type.

    The product theta t is formed and reduced modulo 2 pi in fp64, so angles are right to fp32 rounding at any position
    (in fp32 they would be off by 0.03 at a million). Gradients reach x and theta; theta's is summed in fp64.
    Raises ValueError naming the argument that does not fit.
    """
    if x.dim() != 4 or not torch.is_floating_point(x):
        raise ValueError(f"x.shape={tuple(x.shape)}, x.dtype={x.dtype} must be [B, T, H, d] of a floating type")
    batch, total, heads, width = x.shape
    if theta.shape != (heads, 1, width):
        raise ValueError(f"theta.shape={tuple(theta.shape)} must be [H, 1, d] = {(heads, 1, width)}")
    if positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"positions.dtype={positions.dtype} must be int32 or int64: floats lose long positions")
    if positions.shape not in ((total,), (batch, total)):
        raise ValueError(f"positions.shape={tuple(positions.shape)} must be [T] = {(total,)} or [B, T]")
    return torch.ops.megatron_tn.lrpe_forward(x, theta, positions)


@torch.library.custom_op("megatron_tn::lrpe_forward", mutates_args=())
def _forward(x: Tensor, theta: Tensor, positions: Tensor) -> Tensor:
    cos, sin = _table(theta, positions, accumulation_dtype(x.dtype))
    width = x.shape[-1]
    out = torch.empty(*x.shape[:-1], 2 * width, dtype=x.dtype, device=x.device)
    torch.mul(x, cos, out=out[..., :width])
    torch.mul(x, sin, out=out[..., width:])
    return out


@torch.library.custom_op("megatron_tn::lrpe_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, theta: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = _table(theta, positions, accumulation_dtype(x.dtype))
    dcos, dsin = dy.chunk(2, dim=-1)
    dx = torch.addcmul(dcos * cos, dsin, sin)
    # d angle, [B, T, H, d]; times t and summed over all positions it is theta's gradient.
    dangle = (dsin * cos - dcos * sin).mul_(x)
    t = positions.to(torch.float64).expand(x.shape[:2]).reshape(1, -1)
    dtheta = (t @ dangle.reshape(t.shape[1], -1).to(torch.float64)).view(theta.shape)
    return dx.to(x.dtype).contiguous(), dtheta.to(theta.dtype)


@_forward.register_fake
def _forward_fake(x, theta, positions):
    return x.new_empty(*x.shape[:-1], 2 * x.shape[-1])


@_backward.register_fake
def _backward_fake(dy, x, theta, positions):
    return x.new_empty(x.shape), theta.new_empty(theta.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy):
    return *torch.ops.megatron_tn.lrpe_backward(dy, *ctx.saved_tensors), None


_forward.register_autograd(_differentiate, setup_context=_save)


def _table(theta: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of theta t, [T, H, d] or [B, T, H, d] as positions are [T] or [B, T]."""
    angle = theta[:, 0].to(torch.float64) * positions[..., None, None]
    # Reduced in fp64, so that cos and sin, the greater part of the work, can be taken in fp32.
    angle = (angle - (angle / math.tau).round() * math.tau).to(dtype)
    return angle.cos(), angle.sin()
