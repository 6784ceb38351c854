"""SGLU's product in Triton: every tensor is read or written once, forward and backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.rows import as_rows

BLOCK, WARPS = 2048, 4  # elements per program: 16 per thread, two 16-byte accesses per tensor


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


def forward(*, a: Tensor, b: Tensor, act: str) -> Tensor:
    """a, b: [..., F] -> act(a) * b, contiguous, in their type."""
    y = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    _launch(forward_kernel, {"a": a, "b": b}, act=act, y_pointer=y)
    return y


def backward(*, dy: Tensor, a: Tensor, b: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """dy, a, b: [..., F] -> the gradients of a and b, contiguous, in their type."""
    da, db = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (a, b))
    _launch(backward_kernel, {"dy": dy, "a": a, "b": b}, act=act, da_pointer=da, db_pointer=db)
    return da, db


def _launch(kernel, inputs: dict[str, Tensor], *, act: str, **outputs: Tensor) -> None:
    """One program per BLOCK columns of a row. inputs: passed to the kernel as NAME_pointer, row strides as NAME_row."""
    if all(x.is_contiguous() for x in inputs.values()):
        rows = {name: x.view(1, -1) for name, x in inputs.items()}  # one long row: at most one partial block
    else:
        rows = {name: as_rows(x) for name, x in inputs.items()}
    count, width = rows["a"].shape
    arguments = dict(outputs)
    for name, x in rows.items():
        arguments |= {f"{name}_pointer": x, f"{name}_row": x.stride(0)}
    with torch.cuda.device_of(rows["a"]):
        kernel[(triton.cdiv(width, BLOCK) * count,)](
            **arguments, width=width, SILU=act == "silu", BLOCK=BLOCK, num_warps=WARPS
        )
