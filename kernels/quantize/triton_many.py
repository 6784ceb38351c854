"""The two launches of many.py: the largest element of every group, then all tiles of all matrices.

A table on the device has a row of FIELDS integers for each matrix. Matrices lie anywhere in memory: their offsets, in
elements, are from the first one's address.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.quantize.reference import SHIFTS
from kernels.quantize.triton_quantize import COLUMNS, ROWS, WARPS, quantize_tile, scales

FIELDS = 8  # offsets of x, rows, transposed; count; width; elements between rows of transposed; first tile; group


@triton.jit
def many_largest_kernel(
    x_pointer,
    table_pointer,
    matrix_pointer,
    largest_pointer,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """A program takes BLOCK elements that follow each other. It is one of as many programs as its matrix has tiles of
    BLOCK elements in `many_quantize_kernel`, which are at least as many as its blocks."""
    program = tl.program_id(0)
    entry = table_pointer + tl.load(matrix_pointer + program) * FIELDS
    x_pointer += tl.multiple_of(tl.load(entry), 8)
    elements = tl.multiple_of(tl.load(entry + 3) * tl.load(entry + 4), 16)
    place = (program - tl.load(entry + 6)) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_pointer + place, mask=place < elements, other=0.0).to(tl.float32)
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    slot = largest_pointer + tl.load(entry + 7) * SLOTS + program % SLOTS
    tl.atomic_max(slot, tl.max(bits, axis=0), sem="relaxed")


@triton.jit
def many_quantize_kernel(
    x_pointer,
    table_pointer,
    matrix_pointer,
    largest_pointer,
    data_pointer,
    scale_pointer,
    FIELDS: tl.constexpr,
    SLOTS: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SHIFT: tl.constexpr,
    MOST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    entry = table_pointer + tl.load(matrix_pointer + program) * FIELDS
    group = tl.load(entry + 7)
    scale, inverse = scales(tl.max(tl.load(largest_pointer + group * SLOTS + tl.arange(0, SLOTS)), axis=0), SHIFT)
    tile = (program - tl.load(entry + 6)).to(tl.int32)
    if tile == 0:
        tl.store(scale_pointer + group * SCALE_STRIDE, scale)
    count = tl.multiple_of(tl.load(entry + 3).to(tl.int32), 16)
    width = tl.multiple_of(tl.load(entry + 4).to(tl.int32), 16)
    quantize_tile(
        tile,
        x_pointer + tl.multiple_of(tl.load(entry), 8),
        data_pointer + tl.multiple_of(tl.load(entry + 1), 16),
        data_pointer + tl.multiple_of(tl.load(entry + 2), 16) if TRANSPOSED else None,
        inverse,
        count,
        width,
        width,
        count,
        tl.multiple_of(tl.load(entry + 5).to(tl.int32), 16),
        MOST,
        ROWS,
        COLUMNS,
    )


class Plan:
    """The table, and for each program its matrix; valid for matrices at these `offsets`, in bytes, from the first."""

    def __init__(self, many, groups: Sequence[Sequence[Tensor]], offsets: list[int]):
        self.offsets = offsets
        places = iter(offsets)
        table, tiles = [], []
        for group, matrices in enumerate(groups):
            rows, transposed, _ = many.operands[group]
            below, start, start_transposed = 0, rows.storage_offset(), transposed.storage_offset()
            transposed_row = transposed.shape[1] if many.transposed else 0
            for count, width in (matrix.shape for matrix in matrices):
                table.append(
                    [
                        next(places) // 2,
                        start + below * width,
                        start_transposed + below,
                        count,
                        width,
                        transposed_row,
                        sum(tiles),
                        group,
                    ]
                )
                tiles.append(triton.cdiv(count, ROWS) * triton.cdiv(width, COLUMNS))
                below += count
        device = many.bits.device
        self.table = torch.tensor(table, dtype=torch.int64, device=device)
        self.matrix = torch.arange(len(table), device=device).repeat_interleave(torch.tensor(tiles, device=device))


def quantize(first: Tensor, many) -> None:
    """many: a `ManyMatrices`; first: its first matrix, from which offsets count."""
    plan, slots = many.plan, many.bits.shape[1]
    shared = (first, plan.table, plan.matrix, many.bits.zero_())
    with torch.cuda.device_of(first):
        many_largest_kernel[(len(plan.matrix),)](
            *shared, FIELDS=FIELDS, BLOCK=ROWS * COLUMNS, SLOTS=slots, num_warps=WARPS
        )
        dtype = many.buffer.dtype
        many_quantize_kernel[(len(plan.matrix),)](
            *shared,
            many.buffer,
            many.scales,
            FIELDS=FIELDS,
            SLOTS=slots,
            SCALE_STRIDE=many.scales.stride(0),
            TRANSPOSED=many.transposed,
            SHIFT=SHIFTS[dtype],
            MOST=torch.finfo(dtype).max,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            num_warps=WARPS,
        )
