"""The gate with its sum of squares, and the scale by it, in Triton: one program a row, which it reads once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.rows import as_rows, block_for


@triton.jit
def gate_forward_kernel(o_pointer, u_pointer, y_pointer, square_sum_pointer, o_row, u_row, width, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    mask = column < width
    o = tl.load(o_pointer + row * o_row + column, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(u_pointer + row * u_row + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_pointer + row * width + column, (o * u).to(y_pointer.dtype.element_ty), mask=mask)
    tl.store(square_sum_pointer + row, tl.sum(o * o, axis=0))


@triton.jit
def gate_backward_kernel(
    dy_pointer,
    dsquare_sum_pointer,
    o_pointer,
    u_pointer,
    do_pointer,
    du_pointer,
    dy_row,
    o_row,
    u_row,
    width,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    mask = column < width
    dsquare_sum = tl.load(dsquare_sum_pointer + row)
    dy = tl.load(dy_pointer + row * dy_row + column, mask=mask, other=0.0).to(tl.float32)
    o = tl.load(o_pointer + row * o_row + column, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(u_pointer + row * u_row + column, mask=mask, other=0.0).to(tl.float32)
    do = dy * u + 2.0 * dsquare_sum * o
    tl.store(do_pointer + row * width + column, do.to(do_pointer.dtype.element_ty), mask=mask)
    tl.store(du_pointer + row * width + column, (dy * o).to(du_pointer.dtype.element_ty), mask=mask)


@triton.jit
def scale_forward_kernel(
    y_pointer, square_sum_pointer, out_pointer, y_row, width, summed_width, eps, WIDTH: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    mask = column < width
    scale = 1.0 / tl.sqrt(tl.load(square_sum_pointer + row) / summed_width + eps)
    y = tl.load(y_pointer + row * y_row + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_pointer + row * width + column, (y * scale).to(out_pointer.dtype.element_ty), mask=mask)


@triton.jit
def scale_backward_kernel(
    dout_pointer,
    y_pointer,
    square_sum_pointer,
    dy_pointer,
    dsquare_sum_pointer,
    dout_row,
    y_row,
    width,
    summed_width,
    eps,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    mask = column < width
    scale = 1.0 / tl.sqrt(tl.load(square_sum_pointer + row) / summed_width + eps)
    dout = tl.load(dout_pointer + row * dout_row + column, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_pointer + row * y_row + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(dy_pointer + row * width + column, (dout * scale).to(dy_pointer.dtype.element_ty), mask=mask)
    along = tl.sum(dout * y, axis=0)
    tl.store(dsquare_sum_pointer + row, along * scale * scale * scale * (-0.5 / summed_width))


def gate_forward(o: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """o, u: [..., D] -> o * u in their type, contiguous, and the sum of o^2 over D in fp32."""
    y = torch.empty(o.shape, dtype=o.dtype, device=o.device)
    square_sum = torch.empty(o.shape[:-1], dtype=torch.float32, device=o.device)
    _launch(gate_forward_kernel, (o, u, y, square_sum), (o, u), o.shape[-1])
    return y, square_sum


def gate_backward(dy: Tensor, dsquare_sum: Tensor, o: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of o and u, contiguous. dsquare_sum: [...], fp32."""
    do, du = (torch.empty(o.shape, dtype=o.dtype, device=o.device) for _ in range(2))
    _launch(gate_backward_kernel, (dy, dsquare_sum.contiguous(), o, u, do, du), (dy, o, u), o.shape[-1])
    return do, du


def scale_forward(y: Tensor, square_sum: Tensor, width: int, eps: float) -> Tensor:
    """y [..., D] * rsqrt(square_sum / width + eps), contiguous, in y's type. square_sum: [...], fp32."""
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    _launch(scale_forward_kernel, (y, square_sum.contiguous(), out), (y,), y.shape[-1], width, eps)
    return out


def scale_backward(dout: Tensor, y: Tensor, square_sum: Tensor, width: int, eps: float) -> tuple[Tensor, Tensor]:
    """The gradients of y, contiguous, and of square_sum."""
    dy = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    dsquare_sum = torch.empty(square_sum.shape, dtype=torch.float32, device=y.device)
    _launch(
        scale_backward_kernel, (dout, y, square_sum.contiguous(), dy, dsquare_sum), (dout, y), y.shape[-1], width, eps
    )
    return dy, dsquare_sum


def _launch(kernel, tensors: tuple[Tensor, ...], strided: tuple[Tensor, ...], width: int, *numbers) -> None:
    """One program a row. strided: which of the tensors are read as rows of their own stride, in the kernel's order."""
    rows = {id(x): as_rows(x) for x in strided}
    count = tensors[0].numel() // width
    block, warps = block_for(width)
    with torch.cuda.device_of(tensors[0]):
        kernel[(count,)](
            *(rows.get(id(x), x) for x in tensors),
            *(rows[id(x)].stride(0) for x in strided),
            width,
            *numbers,
            WIDTH=block,
            num_warps=warps,
        )
