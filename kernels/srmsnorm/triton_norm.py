"""SimpleRMSNorm in Triton: one program per row, which it reads once and keeps in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.quantize.noted import SLOTS
from kernels.quantize.triton_quantize import note_largest
from kernels.rows import as_rows, block_for


@triton.jit
def forward_kernel(
    x_pointer,
    r_pointer,  # None: nothing is added, and no sum is written
    square_sum_pointer,  # [rows] fp32: r is divided by sqrt(square_sum / width + eps) before the addition; None: not
    sum_pointer,
    y_pointer,
    x_row,
    r_row,
    width,
    eps,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    mask = column < width
    total = tl.load(x_pointer + row * x_row + column, mask=mask, other=0.0).to(tl.float32)
    if r_pointer is not None:
        r = tl.load(r_pointer + row * r_row + column, mask=mask, other=0.0).to(tl.float32)
        if square_sum_pointer is not None:
            r *= 1.0 / tl.sqrt(tl.load(square_sum_pointer + row) / width + eps)
        rounded = (total + r).to(sum_pointer.dtype.element_ty)
        tl.store(sum_pointer + row * width + column, rounded, mask=mask)
        total = rounded.to(tl.float32)  # the norm is of the rounded sum, as the backward pass reads the rounded sum
    scale = 1.0 / tl.sqrt(tl.sum(total * total, axis=0) / width + eps)
    tl.store(y_pointer + row * width + column, (total * scale).to(y_pointer.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    dsum_pointer,  # None: the sum has no other use
    dy_pointer,
    sum_pointer,
    r_pointer,  # r and square_sum: None where r was not divided
    square_sum_pointer,
    dx_pointer,  # written: dx, which is also dr where r was not divided
    dr_pointer,
    dsquare_sum_pointer,
    largest_pointer,  # of dr; None: not noted
    dsum_row,
    dy_row,
    sum_row,
    r_row,
    width,
    eps,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    mask = column < width
    dy = tl.load(dy_pointer + row * dy_row + column, mask=mask, other=0.0).to(tl.float32)
    total = tl.load(sum_pointer + row * sum_row + column, mask=mask, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(total * total, axis=0) / width + eps)
    along = tl.sum(dy * total, axis=0) * scale * scale / width
    dx = (dy - total * along) * scale
    if dsum_pointer is not None:
        dx += tl.load(dsum_pointer + row * dsum_row + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_pointer + row * width + column, dx.to(dx_pointer.dtype.element_ty), mask=mask)
    dr = dx
    if square_sum_pointer is not None:
        r = tl.load(r_pointer + row * r_row + column, mask=mask, other=0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.load(square_sum_pointer + row) / width + eps)
        dr = dx * scale
        tl.store(dr_pointer + row * width + column, dr.to(dr_pointer.dtype.element_ty), mask=mask)
        tl.store(dsquare_sum_pointer + row, tl.sum(dx * r, axis=0) * scale * scale * scale * (-0.5 / width))
    if largest_pointer is not None:
        note_largest(largest_pointer, dr.to(dx_pointer.dtype.element_ty), SLOTS)


def forward(
    *, x: Tensor, residual: Tensor | None = None, square_sum: Tensor | None = None, eps: float
) -> tuple[Tensor | None, Tensor]:
    """x, residual: [..., D] -> (s, norm(s)), s = x + residual, contiguous, in x's type; residual None: (None, norm(x)).
    square_sum: [...] fp32: the residual is divided by sqrt(square_sum / D + eps) first; None: not."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty_like(y)
    _launch(
        forward_kernel,
        {"x": x, "r": residual},
        eps=eps,
        square_sum_pointer=None if square_sum is None else square_sum.contiguous(),
        sum_pointer=total,
        y_pointer=y,
    )
    return total, y


def backward(*, dtotal: Tensor | None, dy: Tensor, total: Tensor, eps: float, largest: Tensor | None = None) -> Tensor:
    """The gradient of the sum that is normalised, and so of x and the residual: contiguous, in its type. dtotal: that
    by its other use; None: it has none. largest: zeros, int32 [SLOTS], for `note_largest`."""
    dx = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    scaling = dict.fromkeys(("square_sum_pointer", "dr_pointer", "dsquare_sum_pointer"))
    inputs = {"dsum": dtotal, "dy": dy, "sum": total, "r": None}
    _launch(backward_kernel, inputs, eps=eps, dx_pointer=dx, largest_pointer=largest, SLOTS=SLOTS, **scaling)
    return dx


def scaled_backward(
    *,
    dtotal: Tensor,
    dy: Tensor,
    total: Tensor,
    residual: Tensor,
    square_sum: Tensor,
    eps: float,
    largest: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, residual and square_sum, contiguous. largest: as for `backward`, of the residual's."""
    dx, dresidual = (torch.empty(total.shape, dtype=total.dtype, device=total.device) for _ in range(2))
    dsquare_sum = torch.empty(square_sum.shape, dtype=torch.float32, device=total.device)
    _launch(
        backward_kernel,
        {"dsum": dtotal, "dy": dy, "sum": total, "r": residual},
        eps=eps,
        square_sum_pointer=square_sum.contiguous(),
        dx_pointer=dx,
        dr_pointer=dresidual,
        dsquare_sum_pointer=dsquare_sum,
        largest_pointer=largest,
        SLOTS=SLOTS,
    )
    return dx, dresidual, dsquare_sum


def _launch(kernel, inputs: dict[str, Tensor | None], **arguments) -> None:
    """One program per row. inputs: [..., D] each, passed to the kernel as NAME_pointer with row stride NAME_row."""
    rows = {name: None if x is None else as_rows(x) for name, x in inputs.items()}
    for name, x in rows.items():
        arguments |= {f"{name}_pointer": x, f"{name}_row": 0 if x is None else x.stride(0)}
    first = next(x for x in rows.values() if x is not None)
    count, width = first.shape
    block, warps = block_for(width)
    with torch.cuda.device_of(first):
        kernel[(count,)](**arguments, width=width, WIDTH=block, num_warps=warps)
