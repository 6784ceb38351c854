"""Triton kernels around the output head's gradient products, one pass over memory each."""

import torch
import triton
import triton.language as tl
from torch import Tensor

SCALE_BLOCK = 2048


@triton.jit
def gradient_kernel(
    exponentials_pointer,  # [n, V], updated at each token's target
    hidden_pointer,  # [n, D]
    scaled_pointer,  # [n, D], contiguous, written: hidden / Z
    scale_pointer,  # [n] fp32, written: 1 / Z
    target_row_pointer,  # [n] int64
    has_loss_pointer,  # [n] bool
    reference_pointer,  # [n] fp32
    normalizer_pointer,  # [n] fp32: log of the sum of exp(logit)
    target_logit_pointer,  # [n] fp32
    depth,
    exponentials_row,
    hidden_row,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(target_row_pointer + token)
    reference = tl.load(reference_pointer + token)
    normalizer = tl.load(normalizer_pointer + token)
    target_logit = tl.load(target_logit_pointer + token)
    scale = tl.where(tl.load(has_loss_pointer + token), tl.exp(reference - normalizer), 0.0)
    tl.store(scale_pointer + token, scale)
    target = tl.exp(target_logit - reference) - tl.exp(normalizer - reference)
    at_target = exponentials_pointer + token * exponentials_row + tl.maximum(row, 0)
    tl.store(at_target, target.to(exponentials_pointer.dtype.element_ty), mask=row >= 0)
    for start in range(0, depth, BLOCK):
        at = start + tl.arange(0, BLOCK)
        h = tl.load(hidden_pointer + token * hidden_row + at, mask=at < depth, other=0.0).to(tl.float32)
        tl.store(scaled_pointer + token * depth + at, (h * scale).to(scaled_pointer.dtype.element_ty), mask=at < depth)


@triton.jit
def scale_kernel(
    x_pointer,  # [n, D], contiguous
    out_pointer,  # [n, D], contiguous
    factor_pointer,  # one fp32
    scales_pointer,  # [n] fp32
    depth,
    HAS_SCALES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(depth, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(factor_pointer)
    if HAS_SCALES:
        factor *= tl.load(scales_pointer + row)
    x = tl.load(x_pointer + row * depth + at, mask=at < depth, other=0.0).to(tl.float32)
    tl.store(out_pointer + row * depth + at, (x * factor).to(out_pointer.dtype.element_ty), mask=at < depth)


def gradient_(
    out: Tensor,
    *,
    scaled: Tensor,
    hidden: Tensor,
    target_rows: Tensor,
    has_loss: Tensor,
    reference: Tensor,
    normalizer: Tensor,
    target_logits: Tensor,
) -> Tensor:
    """See `head_gradient_` in steps.py."""
    tokens, depth = hidden.shape
    scale = torch.empty(tokens, dtype=torch.float32, device=hidden.device)
    with torch.cuda.device_of(hidden):
        gradient_kernel[(tokens,)](
            exponentials_pointer=out,
            hidden_pointer=hidden,
            scaled_pointer=scaled,
            scale_pointer=scale,
            target_row_pointer=target_rows,
            has_loss_pointer=has_loss,
            reference_pointer=reference,
            normalizer_pointer=normalizer,
            target_logit_pointer=target_logits,
            depth=depth,
            exponentials_row=out.stride(0),
            hidden_row=hidden.stride(0),
            BLOCK=1024,
            num_warps=4,
        )
    return scale


def scaled(x: Tensor, *, factor: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See `head_scaled` in steps.py."""
    rows, depth = x.shape
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    with torch.cuda.device_of(x):
        scale_kernel[(rows * triton.cdiv(depth, SCALE_BLOCK),)](
            x_pointer=x.contiguous(),
            out_pointer=out,
            factor_pointer=factor,
            scales_pointer=scales,
            depth=depth,
            HAS_SCALES=scales is not None,
            BLOCK=SCALE_BLOCK,
            num_warps=4,
        )
    return out
