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
def add_forward_kernel(x_pointer, r_pointer, sum_pointer, y_pointer, x_row, r_row, width, eps, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    mask = column < width
    x = tl.load(x_pointer + row * x_row + column, mask=mask, other=0.0).to(tl.float32)
    r = tl.load(r_pointer + row * r_row + column, mask=mask, other=0.0).to(tl.float32)
    total = (x + r).to(sum_pointer.dtype.element_ty)
    tl.store(sum_pointer + row * width + column, total, mask=mask)
    total = total.to(tl.float32)  # the norm of what is stored, so that the backward pass sees the same
    scale = 1.0 / tl.sqrt(tl.sum(total * total, axis=0) / width + eps)
    tl.store(y_pointer + row * width + column, (total * scale).to(y_pointer.dtype.element_ty), mask=mask)


@triton.jit
def add_backward_kernel(
    dsum_pointer, dy_pointer, sum_pointer, dx_pointer, dsum_row, dy_row, sum_row, width, eps, WIDTH: tl.constexpr
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


def add_forward(x: Tensor, residual: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual: [..., D] -> their sum and its norm, contiguous, in their type."""
    total, y = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    _launch(add_forward_kernel, (x, residual), (total, y), eps)
    return total, y


def add_backward(dtotal: Tensor, dy: Tensor, total: Tensor, eps: float) -> Tensor:
    """The gradient of x, which is that of the residual too."""
    dx = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    _launch(add_backward_kernel, (dtotal, dy, total), (dx,), eps)
    return dx


def _launch(kernel, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], eps: float) -> None:
    """One program a row."""
    rows = [as_rows(x) for x in inputs]
    count, width = rows[0].shape
    block, warps = block_for(width)
    with torch.cuda.device_of(rows[0]):
        kernel[(count,)](*rows, *outputs, *(x.stride(0) for x in rows), width, eps, WIDTH=block, num_warps=warps)
