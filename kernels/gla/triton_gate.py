"""The gate in Triton: one program per token, over all heads, which reads and writes each tensor once.

Forward y = o u and the sum of o^2; backward do = dy u + 2 dsum o and du = dy o. u and du are views of the fused
projection and its gradient. Fusing the gate into the scans would save the traffic of 2 of 24 tensors, but the scans
have no registers left.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.quantize.noted import SLOTS
from kernels.quantize.triton_quantize import note_largest
from kernels.rows import as_rows, block_for


@triton.jit
def gate_kernel(
    o_pointer,
    u_pointer,
    y_pointer,
    sum_pointer,
    largest_pointer,  # of y; None: not noted
    u_row,
    width,
    GATE: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    mask = column < width
    o = tl.load(o_pointer + row * width + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(sum_pointer + row, tl.sum(o * o, axis=0))
    if GATE:
        u = tl.load(u_pointer + row * u_row + column, mask=mask, other=0.0).to(tl.float32)
        o *= u
        tl.store(y_pointer + row * width + column, o.to(y_pointer.dtype.element_ty), mask=mask)
    if largest_pointer is not None:
        note_largest(largest_pointer, o.to(y_pointer.dtype.element_ty), SLOTS)


@triton.jit
def gate_gradient_kernel(
    dy_pointer,
    dsum_pointer,
    o_pointer,
    u_pointer,
    do_pointer,
    du_pointer,
    largest_pointer,  # of du; None: not noted
    dy_row,
    u_row,
    du_row,
    width,
    GATE: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    mask = column < width
    o = tl.load(o_pointer + row * width + column, mask=mask, other=0.0).to(tl.float32)
    do = tl.zeros([WIDTH], dtype=tl.float32)
    du = tl.zeros([WIDTH], dtype=tl.float32)
    if dy_pointer is not None:
        dy = tl.load(dy_pointer + row * dy_row + column, mask=mask, other=0.0).to(tl.float32)
        if GATE:
            u = tl.load(u_pointer + row * u_row + column, mask=mask, other=0.0).to(tl.float32)
            do = dy * u
            du = dy * o
        else:
            do = dy
    if dsum_pointer is not None:
        do += 2.0 * tl.load(dsum_pointer + row) * o
    tl.store(do_pointer + row * width + column, do.to(do_pointer.dtype.element_ty), mask=mask)
    tl.store(du_pointer + row * du_row + column, du.to(du_pointer.dtype.element_ty), mask=mask)
    if largest_pointer is not None:
        note_largest(largest_pointer, du.to(du_pointer.dtype.element_ty), SLOTS)


def gate(o: Tensor, u: Tensor, *, gated: bool, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """o [..., D], contiguous, u [..., D] -> o u (o itself where not gated) and the sum of o^2 [...] fp32. largest:
    zeros, int32 [SLOTS], for `note_largest` of the first."""
    width = o.shape[-1]
    y = torch.empty(o.shape, dtype=o.dtype, device=o.device) if gated else o
    square_sum = torch.empty(o.shape[:-1], dtype=torch.float32, device=o.device)
    rows = as_rows(u)
    block, warps = block_for(width)
    with torch.cuda.device_of(o):
        gate_kernel[(square_sum.numel(),)](
            o_pointer=o,
            u_pointer=rows,
            y_pointer=y,
            sum_pointer=square_sum,
            largest_pointer=largest,
            u_row=rows.stride(0),
            width=width,
            GATE=gated,
            SLOTS=SLOTS,
            WIDTH=block,
            num_warps=warps,
        )
    return y, square_sum


def gate_gradient(
    *,
    dy: Tensor | None,
    dsquare_sum: Tensor | None,
    o: Tensor,
    u: Tensor,
    du: Tensor,
    gated: bool,
    largest: Tensor | None = None,
) -> Tensor:
    """do [..., D], contiguous. The gradient of u is written to `du`, whose rows must be evenly spaced. largest: as for
    `gate`, of du."""
    width = o.shape[-1]
    do = torch.empty(o.shape, dtype=o.dtype, device=o.device)
    u_rows, du_rows = as_rows(u), du.view(-1, width)
    dy_rows = None if dy is None else as_rows(dy)
    block, warps = block_for(width)
    with torch.cuda.device_of(o):
        gate_gradient_kernel[(do.numel() // width,)](
            dy_pointer=dy_rows,
            dsum_pointer=None if dsquare_sum is None else dsquare_sum.contiguous(),
            o_pointer=o,
            u_pointer=u_rows,
            do_pointer=do,
            du_pointer=du_rows,
            largest_pointer=largest,
            dy_row=0 if dy_rows is None else dy_rows.stride(0),
            u_row=u_rows.stride(0),
            du_row=du_rows.stride(0),
            width=width,
            GATE=gated,
            SLOTS=SLOTS,
            WIDTH=block,
            num_warps=warps,
        )
    return do
