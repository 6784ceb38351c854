"""Rotary position embedding (RoPE, arXiv 2104.09864) of the queries and keys of softmax attention."""

import torch
from torch import Tensor

from kernels import dispatch
from kernels.rope.angles import cos_sin


def rope(q: Tensor, k: Tensor, positions: Tensor, *, head_dim: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """q and k with each head's halves (a, b) rotated: (a cos - b sin, b cos + a sin), angles base^(-2 j / d) t.

    q, k: [B, T, H d] of one shape and floating type, head after head; j = 0 .. d / 2 - 1 is the index within a half, as
    in LLaMA (the paper pairs neighbouring channels). positions: int64 [T], the tokens' positions t in their documents.
    head_dim: d, even. Angles are exact to fp32 at any position. Returns new tensors, contiguous, in the inputs' type.

    Raises ValueError for other shapes, types or widths.
    """
    if q.shape != k.shape or q.dtype != k.dtype or not torch.is_floating_point(q):
        raise ValueError(
            f"q is {tuple(q.shape)} {q.dtype} and k is {tuple(k.shape)} {k.dtype}; they must be alike, and of a "
            "floating type"
        )
    if head_dim < 2 or head_dim % 2 or q.shape[-1] % head_dim:
        raise ValueError(f"head_dim={head_dim} must be even and divide the width {q.shape[-1]} of q")
    if positions.shape != (q.shape[-2],) or positions.dtype != torch.int64:
        raise ValueError(
            f"positions is {tuple(positions.shape)} {positions.dtype}; it must be ({q.shape[-2]},) of torch.int64"
        )
    return torch.ops.megatron_tn.rope(q, k, positions, head_dim, base, False)


@torch.library.custom_op("megatron_tn::rope", mutates_args=())
def _rope(q: Tensor, k: Tensor, positions: Tensor, head_dim: int, base: float, back: bool) -> tuple[Tensor, Tensor]:
    """back: rotate by the negative angles, which is the gradient of the rotation."""
    if dispatch.choose("rope", q) == "triton":
        from kernels.rope import triton_rope

        return triton_rope.rotate_heads(q, k, positions, head_dim=head_dim, base=base, back=back)
    cos, sin = cos_sin(positions, head_dim, base, q.dtype)
    sin = -sin if back else sin
    return _rotated(q, head_dim, cos, sin), _rotated(k, head_dim, cos, sin)


def _rotated(x: Tensor, head_dim: int, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.unflatten(-1, (-1, head_dim)).to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).to(x.dtype)


@_rope.register_fake
def _rope_fake(q, k, positions, head_dim, base, back):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _save(ctx, inputs, output):
    _, _, positions, ctx.head_dim, ctx.base, ctx.back = inputs
    ctx.save_for_backward(positions)


def _differentiate(ctx, dq, dk):
    (positions,) = ctx.saved_tensors
    return *torch.ops.megatron_tn.rope(dq, dk, positions, ctx.head_dim, ctx.base, not ctx.back), None, None, None, None


_rope.register_autograd(_differentiate, setup_context=_save)
