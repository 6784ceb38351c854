"""SGLU's elementwise product: a gated linear unit without activation (arXiv 2307.14995, equation 10)."""

import torch
from torch import Tensor

from kernels import dispatch
from kernels.activations.plain import ACTIVATIONS, NAMES
from kernels.numerics import accumulation_dtype
from kernels.quantize.noted import slots
from kernels.quantize.op import largest


def sglu(a: Tensor, b: Tensor, act: str = "none") -> Tensor:
    """act(a) * b, in the shape and type of a. a, b: any strides, the same shape and floating type.

    act: a name of kernels/activations; "none" in the released models, "silu" for SwiGLU. Raises ValueError for another
    act, if shapes or types differ, and for integer types.
    """
    if act not in NAMES:
        raise ValueError(f"act={act!r} is not one of {NAMES}")
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(
            f"a is {tuple(a.shape)} {a.dtype} and b is {tuple(b.shape)} {b.dtype}; they must be alike in shape and type"
        )
    if not torch.is_floating_point(a):
        raise ValueError(f"a.dtype={a.dtype} is not a floating type")
    return torch.ops.megatron_tn.sglu_forward(a, b, act)


def sglu_pair_forward(pair: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """pair a | b [T, 2 F], contiguous -> (act(a) * b [T, F], int32 [n]: `kernels.quantize.op.largest` of it). For fp8
    products; without autograd."""
    return torch.ops.megatron_tn.sglu_pair_forward(pair, act)


def sglu_pair_backward(dy: Tensor, pair: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """dy [T, F] -> (the gradient of pair [T, 2 F], `kernels.quantize.op.largest` of it)."""
    return torch.ops.megatron_tn.sglu_pair_backward(dy, pair, act)


@torch.library.custom_op("megatron_tn::sglu_forward", mutates_args=())
def _forward(a: Tensor, b: Tensor, act: str) -> Tensor:
    if dispatch.choose("sglu", a) == "triton":
        from kernels.sglu import triton_sglu

        return triton_sglu.forward(a=a, b=b, act=act)
    if act == "none":
        return (a * b).contiguous()
    return (ACTIVATIONS[act].function(a.to(accumulation_dtype(a.dtype))) * b).to(a.dtype).contiguous()


@torch.library.custom_op("megatron_tn::sglu_backward", mutates_args=())
def _backward(dy: Tensor, a: Tensor, b: Tensor, act: str) -> tuple[Tensor, Tensor]:
    if dispatch.choose("sglu", a) == "triton":
        from kernels.sglu import triton_sglu

        return triton_sglu.backward(dy=dy, a=a, b=b, act=act)
    if act == "none":
        return (dy * b).contiguous(), (dy * a).contiguous()
    wide = a.to(accumulation_dtype(a.dtype))
    da = dy * b.to(wide.dtype) * ACTIVATIONS[act].derivative(wide)
    db = dy * ACTIVATIONS[act].function(wide)
    return da.to(a.dtype).contiguous(), db.to(b.dtype).contiguous()


@_forward.register_fake
def _forward_fake(a, b, act):
    return a.new_empty(a.shape)


@_backward.register_fake
def _backward_fake(dy, a, b, act):
    return a.new_empty(a.shape), b.new_empty(b.shape)


@torch.library.custom_op("megatron_tn::sglu_pair_forward", mutates_args=())
def _pair_forward(pair: Tensor, act: str) -> tuple[Tensor, Tensor]:
    a, b = pair.chunk(2, dim=-1)
    if dispatch.choose("sglu", pair) == "triton":
        from kernels.sglu import triton_sglu

        bits = slots(pair)
        return triton_sglu.forward(a=a, b=b, act=act, largest=bits), bits
    y = _forward(a, b, act)
    return y, largest(y)


@torch.library.custom_op("megatron_tn::sglu_pair_backward", mutates_args=())
def _pair_backward(dy: Tensor, pair: Tensor, act: str) -> tuple[Tensor, Tensor]:
    if dispatch.choose("sglu", pair) == "triton":
        from kernels.sglu import triton_sglu

        bits = slots(pair)
        return triton_sglu.pair_backward(dy=dy, pair=pair, act=act, largest=bits), bits
    gradient = torch.cat(_backward(dy, *pair.chunk(2, dim=-1), act), dim=-1)
    return gradient, largest(gradient)


@_pair_forward.register_fake
def _pair_forward_fake(pair, act):
    return pair.new_empty(pair.shape[0], pair.shape[1] // 2), pair.new_empty(1, dtype=torch.int32)


@_pair_backward.register_fake
def _pair_backward_fake(dy, pair, act):
    return pair.new_empty(pair.shape), pair.new_empty(1, dtype=torch.int32)


def _save(ctx, inputs, output):
    a, b, ctx.act = inputs
    ctx.save_for_backward(a, b)


def _differentiate(ctx, dy):
    return *torch.ops.megatron_tn.sglu_backward(dy, *ctx.saved_tensors, ctx.act), None


_forward.register_autograd(_differentiate, setup_context=_save)
