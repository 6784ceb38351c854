"""SimpleRMSNorm in Triton: one program per row, which it reads once and keeps in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.quantize.noted import SLOTS
from kernels.quantize.triton_quantize import note_largest
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
    square_sum_pointer,  # [rows] fp32, if SCALED: r is divided by sqrt(square_sum / width + eps) before the addition
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
    total = total.to(tl.float32)  # the norm is of the rounded sum, as the backward pass reads the rounded sum
    scale = 1.0 / tl.sqrt(tl.sum(total * total, axis=0) / width + eps)
    tl.store(y_pointer + row * width + column, (total * scale).to(y_pointer.dtype.element_ty), mask=mask)


@triton.jit
def add_backward_kernel(
    dsum_pointer,
    dy_pointer,
    sum_pointer,
    r_pointer,  # r and square_sum: None unless SCALED
    square_sum_pointer,
    dx_pointer,  # written: dx, which unless SCALED is also dr
    dr_pointer,
    dsquare_sum_pointer,
    largest_pointer,  # of dr; None: not noted
    dsum_row,
    dy_row,
    sum_row,
    r_row,
    width,
    eps,
    SCALED: tl.constexpr,
    SLOTS: tl.constexpr,
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
    dr = dx
    if SCALED:
        r = tl.load(r_pointer + row * r_row + column, mask=mask, other=0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.load(square_sum_pointer + row) / width + eps)
        dr = dx * scale
        tl.store(dr_pointer + row * width + column, dr.to(dr_pointer.dtype.element_ty), mask=mask)
        tl.store(dsquare_sum_pointer + row, tl.sum(dx * r, axis=0) * scale * scale * scale * (-0.5 / width))
    if largest_pointer is not None:
        note_largest(largest_pointer, dr.to(dx_pointer.dtype.element_ty), SLOTS)


def forward(x: Tensor, *, eps: float) -> Tensor:
    """x: [..., D] -> its norm, contiguous, in x's type."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(forward_kernel, {"x": x}, eps=eps, y_pointer=y)
    return y


def backward(*, dy: Tensor, x: Tensor, eps: float) -> Tensor:
    """dy, x: [..., D] -> the gradient of x, contiguous, in x's type."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(backward_kernel, {"dy": dy, "x": x}, eps=eps, dx_pointer=dx)
    return dx


def add_forward(*, x: Tensor, residual: Tensor, square_sum: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual: [..., D] -> (s, norm(s)), s = x + residual, contiguous, in x's type. square_sum: [...] fp32: the
    residual is divided by sqrt(square_sum / D + eps) first; None: not."""
    total, y = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    _launch(
        add_forward_kernel,
        {"x": x, "r": residual},
        eps=eps,
        square_sum_pointer=None if square_sum is None else square_sum.contiguous(),
        sum_pointer=total,
        y_pointer=y,
        SCALED=square_sum is not None,
    )
    return total, y


def add_backward(*, dtotal: Tensor, dy: Tensor, total: Tensor, eps: float, largest: Tensor | None) -> Tensor:
    """dx, contiguous; the residual's gradient is the same tensor. largest: zeros, int32 [SLOTS], for `note_largest`."""
    dx = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    _launch(
        add_backward_kernel,
        {"dsum": dtotal, "dy": dy, "sum": total},
        eps=eps,
        r_pointer=None,
        square_sum_pointer=None,
        dx_pointer=dx,
        dr_pointer=None,
        dsquare_sum_pointer=None,
        largest_pointer=largest,
        r_row=0,
        SCALED=False,
        SLOTS=SLOTS,
    )
    return dx


def add_scaled_backward(
    *,
    dtotal: Tensor,
    dy: Tensor,
    total: Tensor,
    residual: Tensor,
    square_sum: Tensor,
    eps: float,
    largest: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, residual and square_sum, contiguous. largest: as for `add_backward`, of the residual's."""
    dx, dresidual = (torch.empty(total.shape, dtype=total.dtype, device=total.device) for _ in range(2))
    dsquare_sum = torch.empty(square_sum.shape, dtype=torch.float32, device=total.device)
    _launch(
        add_backward_kernel,
        {"dsum": dtotal, "dy": dy, "sum": total, "r": residual},
        eps=eps,
        square_sum_pointer=square_sum.contiguous(),
        dx_pointer=dx,
        dr_pointer=dresidual,
        dsquare_sum_pointer=dsquare_sum,
        largest_pointer=largest,
        SCALED=True,
        SLOTS=SLOTS,
    )
    return dx, dresidual, dsquare_sum


def _launch(kernel, inputs: dict[str, Tensor], **arguments) -> None:
    """One program per row. inputs: [..., D] each, passed to the kernel as NAME_pointer with row stride NAME_row."""
    rows = {name: as_rows(x) for name, x in inputs.items()}
    count, width = next(iter(rows.values())).shape
    for name, x in rows.items():
        arguments |= {f"{name}_pointer": x, f"{name}_row": x.stride(0)}
    block, warps = block_for(width)
    with torch.cuda.device_of(next(iter(rows.values()))):
        kernel[(count,)](**arguments, width=width, WIDTH=block, num_warps=warps)
