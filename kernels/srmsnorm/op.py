"""SimpleRMSNorm, RMS normalisation without weights, alone and fused with residual additions."""

import torch
from torch import Tensor

from kernels.numerics import accumulation_dtype, dot
from kernels.quantize.noted import note, slots
from kernels.quantize.op import note_plainly
from kernels.rows import backend_of_rows, check_rows


def simple_rms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean of x^2 over the last dimension + eps) (arXiv 2307.14995, equation 12).

    x: [..., D] of any floating type; statistics in fp32 (fp64 for fp64), the result in x's type. Only x is saved; the
    backward pass recomputes the statistics. Raises ValueError for eps < 0, a scalar or an integer type.
    """
    check_rows(x, eps)
    return torch.ops.megatron_tn.srmsnorm_forward(x, eps)


def add_simple_rms_norm(x: Tensor, residual: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(s, simple_rms_norm(s)) with s = x + residual, in one pass: the residual addition between two sublayers.

    x, residual: [..., D], of the same shape and floating type. s is rounded to that type before the norm, as with two
    separate operators. Raises ValueError if shapes or types differ, and as simple_rms_norm does.
    """
    check_rows(x, eps, residual)
    return torch.ops.megatron_tn.add_srmsnorm_forward(x, residual, None, eps)


def add_scaled_simple_rms_norm(
    x: Tensor, residual: Tensor, square_sum: Tensor, eps: float = 1e-6, noting: bool = False
) -> tuple[Tensor, Tensor]:
    """`add_simple_rms_norm` of x and residual / sqrt(square_sum / D + eps), in one pass.

    For a norm before a matrix product whose scale, one number per row, is applied after the product: (y / rms(o)) W =
    (y W) / rms(o). square_sum is then the sum of o^2 over all tensor-parallel ranks.

    x, residual: [..., D], of the same shape and floating type. square_sum: [...], fp32 (fp64 for fp64), a sum over D
    elements. The scaled residual is not rounded before the addition. noting: whether the backward pass notes the
    largest element of the residual's gradient (kernels/quantize/noted.py). Raises ValueError for other shapes or types.
    """
    check_rows(x, eps, residual)
    wide = accumulation_dtype(x.dtype)
    if square_sum.shape != x.shape[:-1] or square_sum.dtype != wide:
        raise ValueError(
            f"square_sum is {tuple(square_sum.shape)} {square_sum.dtype}; it must be x.shape[:-1]="
            f"{tuple(x.shape[:-1])} of {wide}"
        )
    return torch.ops.megatron_tn.add_srmsnorm_forward(x, residual, square_sum, eps, noting)


def branch_simple_rms_norm(x: Tensor, eps: float = 1e-6, noting: bool = False) -> tuple[Tensor, Tensor]:
    """(x, simple_rms_norm(x)), where a sublayer branches off the residual stream: one backward kernel computes the
    norm's gradient and adds the gradient of the first result.

    x: [..., D]. The first result is x itself, under autograd. noting: whether the backward pass notes the largest
    element of x's gradient (kernels/quantize/noted.py). Raises ValueError as simple_rms_norm does.
    """
    check_rows(x, eps)
    return _Branch.apply(x, eps, noting)


class _Branch(torch.autograd.Function):
    # Not a registered operator, because those may not return an input. The operators that it calls are registered.
    @staticmethod
    def forward(ctx, x, eps, noting):
        ctx.save_for_backward(x)
        ctx.eps, ctx.noting = eps, noting
        ctx.set_materialize_grads(False)
        return x, torch.ops.megatron_tn.srmsnorm_forward(x, eps)

    @staticmethod
    def backward(ctx, dx, dy):
        if dy is None:
            return dx, None, None
        noting = ctx.noting and dx is not None
        dx, bits = torch.ops.megatron_tn.srmsnorm_backward(dx, dy, *ctx.saved_tensors, ctx.eps, noting)
        return note(dx, bits), None, None


@torch.library.custom_op("megatron_tn::srmsnorm_forward", mutates_args=())
def _forward(x: Tensor, eps: float) -> Tensor:
    if backend_of_rows("simple_rms_norm", x) == "triton":
        from kernels.srmsnorm import triton_norm

        return triton_norm.forward(x=x, eps=eps)[1]
    return (x * _scale(x, eps)).to(x.dtype, memory_format=torch.contiguous_format)


@torch.library.custom_op("megatron_tn::srmsnorm_backward", mutates_args=())
def _backward(
    dtotal: Tensor | None, dy: Tensor, total: Tensor, eps: float, noting: bool = False
) -> tuple[Tensor, Tensor]:
    """dtotal: gradient of what is normalised, by its other use; None: it has none. -> dx, and its largest element
    (empty unless noting)."""
    bits = slots(total, noting)
    if backend_of_rows("simple_rms_norm", total) == "triton":
        from kernels.srmsnorm import triton_norm

        given = {"dtotal": dtotal, "dy": dy, "total": total, "eps": eps}
        return triton_norm.backward(**given, largest=bits if noting else None), bits
    dx = _plain_backward(dy, total, eps)
    if dtotal is not None:
        dx = dtotal + dx
    dx = dx.to(total.dtype, memory_format=torch.contiguous_format)
    note_plainly(dx, bits)
    return dx, bits


@_forward.register_fake
def _forward_fake(x, eps):
    return x.new_empty(x.shape)


@_backward.register_fake
def _backward_fake(dtotal, dy, total, eps, noting=False):
    return total.new_empty(total.shape), slots(total, noting)


def _save(ctx, inputs, output):
    x, ctx.eps = inputs
    ctx.save_for_backward(x)


def _differentiate(ctx, dy):
    return torch.ops.megatron_tn.srmsnorm_backward(None, dy, *ctx.saved_tensors, ctx.eps)[0], None


_forward.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("megatron_tn::add_srmsnorm_forward", mutates_args=())
def _add_forward(
    x: Tensor, residual: Tensor, square_sum: Tensor | None, eps: float, noting: bool = False
) -> tuple[Tensor, Tensor]:
    if backend_of_rows("simple_rms_norm", x) == "triton":
        from kernels.srmsnorm import triton_norm

        return triton_norm.forward(x=x, residual=residual, square_sum=square_sum, eps=eps)
    if square_sum is not None:
        residual = residual * _scale_of(square_sum, x.shape[-1], eps)
    total = (x + residual).to(x.dtype).contiguous()
    return total, (total * _scale(total, eps)).to(x.dtype)


@torch.library.custom_op("megatron_tn::add_scaled_srmsnorm_backward", mutates_args=())
def _add_scaled_backward(
    dtotal: Tensor,
    dy: Tensor,
    total: Tensor,
    residual: Tensor,
    square_sum: Tensor,
    eps: float,
    noting: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, residual and square_sum, and the residual's largest element (empty unless noting)."""
    bits = slots(total, noting)
    if backend_of_rows("simple_rms_norm", total) == "triton":
        from kernels.srmsnorm import triton_norm

        given = {"dtotal": dtotal, "dy": dy, "total": total, "residual": residual, "square_sum": square_sum, "eps": eps}
        return *triton_norm.scaled_backward(**given, largest=bits if noting else None), bits
    dx, width = dtotal + _plain_backward(dy, total, eps), total.shape[-1]
    scale = _scale_of(square_sum, width, eps)
    along = dot(dx, residual.to(dx.dtype)) * scale.squeeze(-1) ** 3
    narrow = [z.to(total.dtype, memory_format=torch.contiguous_format) for z in (dx, dx * scale)]
    note_plainly(narrow[1], bits)
    return *narrow, along * (-0.5 / width), bits


@_add_forward.register_fake
def _add_forward_fake(x, residual, square_sum, eps, noting=False):
    return x.new_empty(x.shape), x.new_empty(x.shape)


@_add_scaled_backward.register_fake
def _add_scaled_backward_fake(dtotal, dy, total, residual, square_sum, eps, noting=False):
    shapes = total.new_empty(total.shape), total.new_empty(total.shape), square_sum.new_empty(square_sum.shape)
    return *shapes, slots(total, noting)


def _add_save(ctx, inputs, output):
    _, residual, square_sum, ctx.eps, ctx.noting = inputs
    ctx.save_for_backward(output[0], *(() if square_sum is None else (residual, square_sum)))


def _add_differentiate(ctx, dtotal, dy):
    total, *scaling = ctx.saved_tensors
    if not scaling:
        dx, _ = torch.ops.megatron_tn.srmsnorm_backward(dtotal, dy, total, ctx.eps)
        return dx, dx, None, None, None
    dx, dresidual, dsquare_sum, bits = torch.ops.megatron_tn.add_scaled_srmsnorm_backward(
        dtotal, dy, total, *scaling, ctx.eps, ctx.noting
    )
    return dx, note(dresidual, bits), dsquare_sum, None, None


_add_forward.register_autograd(_add_differentiate, setup_context=_add_save)


def _plain_backward(dy: Tensor, x: Tensor, eps: float) -> Tensor:
    """dx, in the accumulation type."""
    scale = _scale(x, eps)
    wide_dy, wide_x = dy.to(scale.dtype), x.to(scale.dtype)
    along = dot(wide_dy, wide_x).unsqueeze(-1)
    return torch.addcmul(wide_dy * scale, wide_x, -along * scale**3 / x.shape[-1])


def _scale(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean of x^2 + eps), [..., 1], in the accumulation type."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=accumulation_dtype(x.dtype))
    return _scale_of(norm.square().squeeze(-1), x.shape[-1], eps)


def _scale_of(square_sum: Tensor, width: int, eps: float) -> Tensor:
    """1 / sqrt(square_sum / width + eps): [...] -> [..., 1]."""
    return torch.rsqrt(square_sum / width + eps).unsqueeze(-1)
