"""RMSNorm in Triton: a row is read once and kept in registers. A program of the backward pass has several rows and
sums up their terms of the weight's gradient in registers, so that one partial sum a program is left."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.rows import as_rows, block_for

PROGRAMS = 512  # at most, in the backward pass: about four on each multiprocessor of a Hopper


@triton.jit
def forward_kernel(
    x_pointer,  # [rows, D]
    residual_pointer,  # [rows, D], or None
    weight_pointer,  # [D]
    sum_pointer,  # [rows, D], x + residual, or None
    y_pointer,
    x_row,
    residual_row,
    width,
    eps,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    mask = column < width
    total = tl.load(x_pointer + row * x_row + column, mask=mask, other=0.0).to(tl.float32)
    if residual_pointer is not None:
        total += tl.load(residual_pointer + row * residual_row + column, mask=mask, other=0.0).to(tl.float32)
        rounded = total.to(sum_pointer.dtype.element_ty)
        tl.store(sum_pointer + row * width + column, rounded, mask=mask)
        total = rounded.to(tl.float32)  # the norm is of the rounded sum, as the backward pass reads the rounded sum
    weight = tl.load(weight_pointer + column, mask=mask, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(total * total, axis=0) / width + eps)
    tl.store(y_pointer + row * width + column, (total * scale * weight).to(y_pointer.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    dsum_pointer,  # [rows, D], or None
    dy_pointer,
    sum_pointer,
    weight_pointer,
    dx_pointer,
    parts_pointer,  # [programs, D] fp32: each program's part of dweight
    dsum_row,
    dy_row,
    sum_row,
    rows,
    width,
    eps,
    WIDTH: tl.constexpr,
):
    column = tl.arange(0, WIDTH)
    mask = column < width
    weight = tl.load(weight_pointer + column, mask=mask, other=0.0).to(tl.float32)
    part = tl.zeros([WIDTH], dtype=tl.float32)
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        dy = tl.load(dy_pointer + row * dy_row + column, mask=mask, other=0.0).to(tl.float32)
        total = tl.load(sum_pointer + row * sum_row + column, mask=mask, other=0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(total * total, axis=0) / width + eps)
        normed = total * scale
        part += dy * normed
        dy *= weight
        dx = (dy - normed * (tl.sum(dy * normed, axis=0) / width)) * scale
        if dsum_pointer is not None:
            dx += tl.load(dsum_pointer + row * dsum_row + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_pointer + row * width + column, dx.to(dx_pointer.dtype.element_ty), mask=mask)
    tl.store(parts_pointer + tl.program_id(0) * width + column, part, mask=mask)


def forward(*, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor | None, Tensor]:
    """x, residual: [..., D] -> (x + residual, its norm), contiguous, in x's type; residual None: (None, norm of x)."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, residual = as_rows(x), None if residual is None else as_rows(residual)
    count, width = x.shape
    block, warps = block_for(width)
    with torch.cuda.device_of(x):
        forward_kernel[(count,)](
            x_pointer=x,
            residual_pointer=residual,
            weight_pointer=weight.contiguous(),
            sum_pointer=total,
            y_pointer=y,
            x_row=x.stride(0),
            residual_row=0 if residual is None else residual.stride(0),
            width=width,
            eps=eps,
            WIDTH=block,
            num_warps=warps,
        )
    return total, y


def backward(*, dtotal: Tensor | None, dy: Tensor, total: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The gradients of the sum, contiguous, and of the weight, each in its type."""
    dx = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    dtotal, dy, total = (None if x is None else as_rows(x) for x in (dtotal, dy, total))
    count, width = total.shape
    programs = min(count, PROGRAMS)
    parts = torch.empty(programs, width, dtype=torch.float32, device=total.device)
    block, warps = block_for(width)
    with torch.cuda.device_of(total):
        backward_kernel[(programs,)](
            dsum_pointer=dtotal,
            dy_pointer=dy,
            sum_pointer=total,
            weight_pointer=weight.contiguous(),
            dx_pointer=dx,
            parts_pointer=parts,
            dsum_row=0 if dtotal is None else dtotal.stride(0),
            dy_row=dy.stride(0),
            sum_row=total.stride(0),
            rows=count,
            width=width,
            eps=eps,
            WIDTH=block,
            num_warps=warps,
        )
    return dx, parts.sum(0).to(weight.dtype)
