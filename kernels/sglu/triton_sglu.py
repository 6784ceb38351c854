"""SGLU's product in Triton: every tensor is read or written once, forward and backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.activations.triton_activations import ACTIVATIONS, activate, slope
from kernels.quantize.noted import SLOTS
from kernels.quantize.triton_quantize import note_largest
from kernels.rows import as_rows

BLOCK, WARPS = 2048, 4  # elements per program: 16 per thread, two 16-byte accesses per tensor


@triton.jit
def forward_kernel(
    a_pointer,
    b_pointer,
    y_pointer,
    largest_pointer,  # None: not noted
    a_row,
    b_row,
    width,
    ACT: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    a = tl.load(a_pointer + row * a_row + column, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(b_pointer + row * b_row + column, mask=mask, other=0.0).to(tl.float32)
    y = (activate(a, ACT, QUICK=False) * b).to(y_pointer.dtype.element_ty)
    tl.store(y_pointer + row * width + column, y, mask=mask)
    if largest_pointer is not None:
        note_largest(largest_pointer, y, SLOTS)


@triton.jit
def backward_kernel(
    dy_pointer,
    a_pointer,
    b_pointer,
    da_pointer,
    db_pointer,
    largest_pointer,  # None: not noted
    dy_row,
    a_row,
    b_row,
    out_row,
    width,
    ACT: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    dy = tl.load(dy_pointer + row * dy_row + column, mask=mask, other=0.0).to(tl.float32)
    a = tl.load(a_pointer + row * a_row + column, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(b_pointer + row * b_row + column, mask=mask, other=0.0).to(tl.float32)
    da, db = dy * b * slope(a, ACT, QUICK=False), dy * activate(a, ACT, QUICK=False)
    da, db = da.to(da_pointer.dtype.element_ty), db.to(db_pointer.dtype.element_ty)
    tl.store(da_pointer + row * out_row + column, da, mask=mask)
    tl.store(db_pointer + row * out_row + column, db, mask=mask)
    if largest_pointer is not None:
        note_largest(largest_pointer, da, SLOTS)
        note_largest(largest_pointer, db, SLOTS)


def forward(*, a: Tensor, b: Tensor, act: str, largest: Tensor | None = None) -> Tensor:
    """a, b: [..., F] -> act(a) * b, contiguous, in their type. largest: zeros, int32 [SLOTS], for `note_largest`."""
    y = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    _launch(forward_kernel, {"a": a, "b": b}, act=act, y_pointer=y, largest_pointer=largest)
    return y


def backward(*, dy: Tensor, a: Tensor, b: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """dy, a, b: [..., F] -> the gradients of a and b, contiguous, in their type."""
    da, db = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (a, b))
    _launch(backward_kernel, {"dy": dy, "a": a, "b": b}, act=act, da_pointer=da, db_pointer=db, largest_pointer=None)
    return da, db


def pair_backward(*, dy: Tensor, pair: Tensor, act: str, largest: Tensor) -> Tensor:
    """dy [T, F], pair a | b [T, 2 F], contiguous -> its gradient."""
    gradient = torch.empty(pair.shape, dtype=pair.dtype, device=pair.device)
    (a, b), (da, db) = pair.chunk(2, dim=-1), gradient.chunk(2, dim=-1)
    inputs = {"dy": dy, "a": a, "b": b}
    _launch(
        backward_kernel, inputs, act=act, da_pointer=da, db_pointer=db, largest_pointer=largest, out_row=pair.shape[-1]
    )
    return gradient


def _launch(kernel, inputs: dict[str, Tensor], *, act: str, **arguments: Tensor | int | None) -> None:
    """One program per BLOCK columns of a row. inputs: passed to the kernel as NAME_pointer, row strides as NAME_row."""
    if all(x.is_contiguous() for x in inputs.values()):
        rows = {name: x.view(1, -1) for name, x in inputs.items()}  # one long row: at most one partial block
    else:
        rows = {name: as_rows(x) for name, x in inputs.items()}
    count, width = rows["a"].shape
    for name, x in rows.items():
        arguments |= {f"{name}_pointer": x, f"{name}_row": x.stride(0)}
    if kernel is backward_kernel:
        arguments.setdefault("out_row", width)
    with torch.cuda.device_of(rows["a"]):
        kernel[(triton.cdiv(width, BLOCK) * count,)](
            **arguments, width=width, ACT=ACTIVATIONS[act], BLOCK=BLOCK, SLOTS=SLOTS, num_warps=WARPS
        )
