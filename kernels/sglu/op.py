"""SGLU's elementwise product: a gated linear unit without activation (arXiv 2307.14995, equation 10)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import dispatch
from kernels.numerics import accumulation_dtype

ACTS = ("none", "silu")


def sglu(a: Tensor, b: Tensor, act: str = "none") -> Tensor:
    """act(a) * b, in the shape and type of a. a, b: any strides, the same shape and floating type.

    act: "none" (the released models) or "silu" (SwiGLU). Raises ValueError for another act, if shapes or types differ,
    and for integer types.
    """
    if act not in ACTS:
        raise ValueError(f"act={act!r} is not one of {ACTS}")
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(
            f"a is {tuple(a.shape)} {a.dtype} and b is {tuple(b.shape)} {b.dtype}; they must be alike in shape and type"
        )
    if not torch.is_floating_point(a):
        raise ValueError(f"a.dtype={a.dtype} is not a floating type")
    return torch.ops.megatron_tn.sglu_forward(a, b, act)


@torch.library.custom_op("megatron_tn::sglu_forward", mutates_args=())
def _forward(a: Tensor, b: Tensor, act: str) -> Tensor:
    if _backend(a) == "triton":
        from kernels.sglu import triton_sglu

        return triton_sglu.forward(a=a, b=b, act=act)
    if act == "none":
        return (a * b).contiguous()
    return (F.silu(a.to(accumulation_dtype(a.dtype))) * b).to(a.dtype).contiguous()


@torch.library.custom_op("megatron_tn::sglu_backward", mutates_args=())
def _backward(dy: Tensor, a: Tensor, b: Tensor, act: str) -> tuple[Tensor, Tensor]:
    if _backend(a) == "triton":
        from kernels.sglu import triton_sglu

        return triton_sglu.backward(dy=dy, a=a, b=b, act=act)
    if act == "none":
        return (dy * b).contiguous(), (dy * a).contiguous()
    wide = a.to(accumulation_dtype(a.dtype))
    gate = torch.sigmoid(wide)
    da = dy * b.to(wide.dtype) * (gate * (1 + wide * (1 - gate)))
    db = dy * (wide * gate)
    return da.to(a.dtype).contiguous(), db.to(b.dtype).contiguous()


@_forward.register_fake
def _forward_fake(a, b, act):
    return a.new_empty(a.shape)


@_backward.register_fake
def _backward_fake(dy, a, b, act):
    return a.new_empty(a.shape), b.new_empty(b.shape)


def _save(ctx, inputs, output):
    a, b, ctx.act = inputs
    ctx.save_for_backward(a, b)


def _differentiate(ctx, dy):
    return *torch.ops.megatron_tn.sglu_backward(dy, *ctx.saved_tensors, ctx.act), None


_forward.register_autograd(_differentiate, setup_context=_save)


def _backend(a: Tensor) -> str:
    unsupported = "its fp32 sums cannot serve float64 inputs" if a.dtype == torch.float64 else None
    return dispatch.choose("sglu", a, unsupported)
