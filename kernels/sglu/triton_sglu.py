"""SGLU's product in Triton: every tensor is read or written once, forward and backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.rows import as_rows

BLOCK, WARPS = 2048, 4  # elements a program: 16 a thread, two 16-byte accesses of each tensor


@triton.jit
def forward_kernel(a_pointer, b_pointer, y_pointer, a_row, b_row, width, SILU: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    a = tl.load(a_pointer + row * a_row + column, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(b_pointer + row * b_row + column, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        a *= tl.sigmoid(a)
    tl.store(y_pointer + row * width + column, (a * b).to(y_pointer.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    dy_pointer,
    a_pointer,
    b_pointer,
    da_pointer,
    db_pointer,
    dy_row,
    a_row,
    b_row,
    width,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    dy = tl.load(dy_pointer + row * dy_row + column, mask=mask, other=0.0).to(tl.float32)
    a = tl.load(a_pointer + row * a_row + column, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(b_pointer + row * b_row + column, mask=mask, other=0.0).to(tl.float32)
    da, db = dy * b, dy * a
    if SILU:
        gate = tl.sigmoid(a)
        da *= gate * (1.0 + a * (1.0 - gate))
        db *= gate
    tl.store(da_pointer + row * width + column, da.to(da_pointer.dtype.element_ty), mask=mask)
    tl.store(db_pointer + row * width + column, db.to(db_pointer.dtype.element_ty), mask=mask)


def forward(a: Tensor, b: Tensor, act: str) -> Tensor:
    """a, b: [..., F] -> contiguous, in their type."""
    y = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    rows = _rows(a, b)
    width = rows[0].shape[1]
    with torch.cuda.device_of(a):
        forward_kernel[(triton.cdiv(width, BLOCK) * rows[0].shape[0],)](
            *rows, y, *(x.stride(0) for x in rows), width, SILU=act == "silu", BLOCK=BLOCK, num_warps=WARPS
        )
    return y


def backward(dy: Tensor, a: Tensor, b: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """dy, a, b: [..., F] -> da, db, contiguous, in their type."""
    da, db = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (a, b))
    rows = _rows(dy, a, b)
    width = rows[0].shape[1]
    with torch.cuda.device_of(a):
        backward_kernel[(triton.cdiv(width, BLOCK) * rows[0].shape[0],)](
            *rows, da, db, *(x.stride(0) for x in rows), width, SILU=act == "silu", BLOCK=BLOCK, num_warps=WARPS
        )
    return da, db


def _rows(*tensors: Tensor) -> list[Tensor]:
    """All as [rows, width]: one long row where all are contiguous, so that no block is partly filled."""
    if all(x.is_contiguous() for x in tensors):
        return [x.view(1, -1) for x in tensors]
    return [as_rows(x) for x in tensors]
