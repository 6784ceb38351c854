"""SimpleRMSNorm in Triton: one program a row, which it reads once and keeps in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.rows import as_rows, block_for


@triton.jit
def forward_kernel(x_pointer, y_pointer, x_row, width, eps, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    mask = column < width
    x = tl.load(x_pointer + row * x_row + column, mask=mask, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / width + eps)
    tl.store(y_pointer + row * width + column, (x * scale).to(y_pointer.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(dy_pointer, x_pointer, dx_pointer, dy_row, x_row, width, eps, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    mask = column < width
    dy = tl.load(dy_pointer + row * dy_row + column, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_pointer + row * x_row + column, mask=mask, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / width + eps)
    along = tl.sum(dy * x, axis=0) * scale * scale / width
    dx = (dy - x * along) * scale
    tl.store(dx_pointer + row * width + column, dx.to(dx_pointer.dtype.element_ty), mask=mask)


@triton.jit
def add_forward_kernel(
    x_pointer,
    r_pointer,
    square_sum_pointer,  # SCALED: [rows] fp32, by which r is still to be normed
    sum_pointer,
    y_pointer,
    x_row,
    r_row,
    width,
    eps,
    SCALED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    mask = column < width
    x = tl.load(x_pointer + row * x_row + column, mask=mask, other=0.0).to(tl.float32)
    r = tl.load(r_pointer + row * r_row + column, mask=mask, other=0.0).to(tl.float32)
    if SCALED:
        r *= 1.0 / tl.sqrt(tl.load(square_sum_pointer + row) / width + eps)
    total = (x + r).to(sum_pointer.dtype.element_ty)
    tl.store(sum_pointer + row * width + column, total, mask=mask)
    total = total.to(tl.float32)  # the norm of what is stored, so that the backward pass sees the same
    scale = 1.0 / tl.sqrt(tl.sum(total * total, axis=0) / width + eps)
    tl.store(y_pointer + row * width + column, (total * scale).to(y_pointer.dtype.element_ty), mask=mask)


@triton.jit
def add_backward_kernel(
    dsum_pointer,
    dy_pointer,
    sum_pointer,
    r_pointer,  # this and the next one: SCALED, as in the forward pass
    square_sum_pointer,
    dx_pointer,  # of r too, unless SCALED
    dr_pointer,
    dsquare_sum_pointer,
    dsum_row,
    dy_row,
    sum_row,
    r_row,
    width,
    eps,
    SCALED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    mask = column < width
    dsum = tl.load(dsum_pointer + row * dsum_row + column, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_pointer + row * dy_row + column, mask=mask, other=0.0).to(tl.float32)
    total = tl.load(sum_pointer + row * sum_row + column, mask=mask, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(total * total, axis=0) / width + eps)
    along = tl.sum(dy * total, axis=0) * scale * scale / width
    dx = dsum + (dy - total * along) * scale
    tl.store(dx_pointer + row * width + column, dx.to(dx_pointer.dtype.element_ty), mask=mask)
    if SCALED:
        r = tl.load(r_pointer + row * r_row + column, mask=mask, other=0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.load(square_sum_pointer + row) / width + eps)
        tl.store(dr_pointer + row * width + column, (dx * scale).to(dr_pointer.dtype.element_ty), mask=mask)
        tl.store(dsquare_sum_pointer + row, tl.sum(dx * r, axis=0) * scale * scale * scale * (-0.5 / width))


def forward(x: Tensor, eps: float) -> Tensor:
    """x: [..., D] -> contiguous, in x's type."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(forward_kernel, (x,), (y,), eps)
    return y


def backward(dy: Tensor, x: Tensor, eps: float) -> Tensor:
    """dy, x: [..., D] -> dx, contiguous, in x's type."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(backward_kernel, (dy, x), (dx,), eps)
    return dx


def add_forward(x: Tensor, residual: Tensor, square_sum: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual: [..., D] -> their sum and its norm, contiguous, in their type. square_sum: [...], fp32, where the
    residual is still to be normed."""
    total, y = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    rows = [as_rows(z) for z in (x, residual)]
    square_sum = None if square_sum is None else square_sum.contiguous()
    strides = [z.stride(0) for z in rows]
    _launch_rows(add_forward_kernel, rows, (*rows, square_sum, total, y, *strides), eps, SCALED=square_sum is not None)
    return total, y


def add_backward(dtotal: Tensor, dy: Tensor, total: Tensor, eps: float) -> Tensor:
    """The gradient of x, which is that of the residual too."""
    dx = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    rows = [as_rows(z) for z in (dtotal, dy, total)]
    strides = [z.stride(0) for z in rows]
    _launch_rows(add_backward_kernel, rows, (*rows, None, None, dx, None, None, *strides, 0), eps, SCALED=False)
    return dx


def add_scaled_backward(
    dtotal: Tensor, dy: Tensor, total: Tensor, residual: Tensor, square_sum: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, of the residual, and of its square sum."""
    dx, dresidual = (torch.empty(total.shape, dtype=total.dtype, device=total.device) for _ in range(2))
    dsquare_sum = torch.empty(square_sum.shape, dtype=torch.float32, device=total.device)
    rows = [as_rows(z) for z in (dtotal, dy, total, residual)]
    strides = [z.stride(0) for z in rows]
    tensors = (*rows, square_sum.contiguous(), dx, dresidual, dsquare_sum)
    _launch_rows(add_backward_kernel, rows, (*tensors, *strides), eps, SCALED=True)
    return dx, dresidual, dsquare_sum


def _launch(kernel, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], eps: float) -> None:
    rows = [as_rows(x) for x in inputs]
    _launch_rows(kernel, rows, (*rows, *outputs, *(x.stride(0) for x in rows)), eps)


def _launch_rows(kernel, rows: list[Tensor], arguments: tuple, eps: float, **constants) -> None:
    """One program a row."""
    count, width = rows[0].shape
    block, warps = block_for(width)
    with torch.cuda.device_of(rows[0]):
        kernel[(count,)](*arguments, width, eps, WIDTH=block, num_warps=warps, **constants)
