"""Quantisation to fp8 in Triton: one read of x, one write of the rows and of the transpose each.

A tile of x goes through registers once; Triton transposes it in shared memory, so that both stores are contiguous.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.quantize.noted import SLOTS
from kernels.quantize.reference import SHIFTS
from kernels.rows import block_for

BLOCK, PROGRAMS = 8192, 1024  # elements a program reads at a time, and programs, in `largest_kernel`
ROWS, COLUMNS, WARPS = 128, 64, 4  # a tile of `quantize_kernel`


@triton.jit
def magnitude_bits(x):
    """The bits of |x| as fp32 numbers: integers in the order of |x|, NaN above infinity."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def note_largest(largest_pointer, x, SLOTS: tl.constexpr):
    """See `kernels.quantize.op.largest`: of x, into one of SLOTS integers."""
    tl.atomic_max(largest_pointer + tl.program_id(0) % SLOTS, tl.max(magnitude_bits(x), axis=0), sem="relaxed")


@triton.jit
def note_rows_kernel(x_pointer, largest_pointer, x_row, width, SLOTS: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)
    x = tl.load(x_pointer + tl.program_id(0).to(tl.int64) * x_row + column, mask=column < width, other=0.0)
    note_largest(largest_pointer, x, SLOTS)


@triton.jit
def largest_kernel(x_pointer, largest_pointer, count, BLOCK: tl.constexpr):
    found = tl.zeros([BLOCK], dtype=tl.int32)
    start, step = tl.program_id(0).to(tl.int64) * BLOCK, tl.num_programs(0).to(tl.int64) * BLOCK
    for turn in range(tl.cdiv(count - start, step)):
        place = start + turn * step + tl.arange(0, BLOCK)
        x = tl.load(x_pointer + place, mask=place < count, other=0.0)
        found = tl.maximum(found, magnitude_bits(x))
    tl.store(largest_pointer + tl.program_id(0), tl.max(found, axis=0))


@triton.jit
def scales(largest, SHIFT: tl.constexpr):
    """The power of two s with largest / s <= the largest fp8 number, and 1 / s; NaN if largest is not finite."""
    field = tl.maximum(((largest + 0x1FFFFF) >> 23) - SHIFT, 1) << 23
    finite = largest < 0x7F800000
    scale = tl.where(finite, field, 0x7FC00000).to(tl.float32, bitcast=True)
    return scale, tl.where(finite, 0x7F000000 - field, 0x7FC00000).to(tl.float32, bitcast=True)


@triton.jit
def quantize_tile(
    tile,
    x_pointer,
    rows_pointer,  # None: not written
    transposed_pointer,  # None: not written
    inverse,
    count,
    width,
    padded_width,
    padded_count,
    transposed_row,
    MOST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile of x [count, width] to rows [count, padded_width] and transposed [padded_width, padded_count], the rows
    of which are transposed_row elements apart."""
    across = tl.cdiv(padded_width, COLUMNS)
    row = (tile // across) * ROWS + tl.arange(0, ROWS)
    column = (tile % across) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < count)[:, None] & (column < width)[None, :]
    x = tl.load(x_pointer + row.to(tl.int64)[:, None] * width + column[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32) * inverse
    x = tl.where(tl.abs(x) > MOST, float("nan"), x)
    if rows_pointer is not None:
        data = x.to(rows_pointer.dtype.element_ty)
        mask = (row < count)[:, None] & (column < padded_width)[None, :]
        tl.store(rows_pointer + row.to(tl.int64)[:, None] * padded_width + column[None, :], data, mask=mask)
    if transposed_pointer is not None:
        data = tl.trans(x.to(transposed_pointer.dtype.element_ty))
        mask = (column < padded_width)[:, None] & (row < padded_count)[None, :]
        tl.store(transposed_pointer + column.to(tl.int64)[:, None] * transposed_row + row[None, :], data, mask=mask)


@triton.jit
def quantize_kernel(
    x_pointer,
    largest_pointer,
    rows_pointer,  # None: not written
    transposed_pointer,  # None: not written
    scale_pointer,
    count,
    width,
    partial,
    padded_width,
    padded_count,
    SHIFT: tl.constexpr,
    MOST: tl.constexpr,
    PARTIAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile = tl.program_id(0)
    some = tl.arange(0, PARTIAL)
    largest = tl.max(tl.load(largest_pointer + some, mask=some < partial, other=0), axis=0)
    scale, inverse = scales(largest, SHIFT)
    if tile == 0:
        tl.store(scale_pointer, scale)
    quantize_tile(
        tile,
        x_pointer,
        rows_pointer,
        transposed_pointer,
        inverse,
        count,
        width,
        padded_width,
        padded_count,
        padded_count,
        MOST,
        ROWS,
        COLUMNS,
    )


@triton.jit
def transpose_kernel(
    rows_pointer, transposed_pointer, count, width, padded_count, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    across = tl.cdiv(width, COLUMNS)
    row = (tl.program_id(0) // across) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < count)[:, None] & (column < width)[None, :]
    data = tl.load(rows_pointer + row.to(tl.int64)[:, None] * width + column[None, :], mask=mask, other=0)
    mask = (column < width)[:, None] & (row < padded_count)[None, :]
    place = column.to(tl.int64)[:, None] * padded_count + row[None, :]
    tl.store(transposed_pointer + place, tl.trans(data), mask=mask)


def largest(x: Tensor) -> Tensor:
    """x, contiguous -> int32 [n]: the largest absolute value of each of n parts, as the bits of an fp32 number."""
    programs = min(triton.cdiv(x.numel(), BLOCK), PROGRAMS)
    found = torch.empty(programs, dtype=torch.int32, device=x.device)
    with torch.cuda.device_of(x):
        largest_kernel[(programs,)](x, found, x.numel(), BLOCK=BLOCK, num_warps=4)
    return found


def note_rows(x: Tensor, largest: Tensor) -> None:
    """Note the largest element of x [rows, width], whose rows may lie apart. largest: int32 [SLOTS], zeros or notes."""
    block, warps = block_for(x.shape[1])
    with torch.cuda.device_of(x):
        note_rows_kernel[(len(x),)](x, largest, x.stride(0), x.shape[1], SLOTS=SLOTS, WIDTH=block, num_warps=warps)


def quantize(x: Tensor, largest: Tensor, *, rows: Tensor, transposed: Tensor, scale: Tensor) -> None:
    """x [T, C], contiguous: writes rows [T, C'] and transposed [C', T'], unless empty, and scale [1]."""
    if x.element_size() == 4 and transposed.numel():
        # Of fp32 numbers Triton 3.6 writes the transpose wrongly on an H200; of bf16 ones, and of bytes, it does not.
        if not rows.numel():
            rows = torch.empty(x.shape[0], transposed.shape[0], dtype=transposed.dtype, device=x.device)
        quantize(x, largest, rows=rows, transposed=transposed[:0], scale=scale)
        transpose(rows, transposed)
        return
    count, width = x.shape
    padded_width = rows.shape[1] if rows.numel() else transposed.shape[0]
    padded_count = transposed.shape[1] if transposed.numel() else count
    programs = triton.cdiv(padded_count, ROWS) * triton.cdiv(padded_width, COLUMNS)
    with torch.cuda.device_of(x):
        quantize_kernel[(programs,)](
            x,
            largest,
            rows if rows.numel() else None,
            transposed if transposed.numel() else None,
            scale,
            count,
            width,
            largest.numel(),
            padded_width,
            padded_count,
            SHIFT=SHIFTS[rows.dtype],
            MOST=torch.finfo(rows.dtype).max,
            PARTIAL=triton.next_power_of_2(largest.numel()),
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            num_warps=WARPS,
        )


def transpose(rows: Tensor, transposed: Tensor) -> None:
    """rows [T, C] fp8, contiguous -> transposed [C, T'], zeros from column T on."""
    count, width = rows.shape
    programs = triton.cdiv(transposed.shape[1], ROWS) * triton.cdiv(width, COLUMNS)
    with torch.cuda.device_of(rows):
        transpose_kernel[(programs,)](
            rows.view(torch.uint8),
            transposed.view(torch.uint8),
            count,
            width,
            transposed.shape[1],
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            num_warps=WARPS,
        )
