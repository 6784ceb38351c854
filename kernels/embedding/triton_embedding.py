"""The scaled embedding in Triton: one pass that reads, multiplies and writes rows.

The backward kernel adds dweight to a buffer in place. One program adds all tokens of an id, in the order of their
positions: deterministic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.rows import as_rows

BLOCK, WARPS = 2048, 4
ADD_TOKENS, ADD_COLUMNS = 16, 256  # tokens of an id, and columns, that add_kernel reads at a time


@triton.jit
def forward_kernel(
    ids_pointer,  # [tokens] int64
    weight_pointer,  # [vocabulary, width]
    y_pointer,  # [tokens, width]
    scale,
    row_start,
    vocabulary,
    weight_row,
    width,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(width, BLOCK)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    row = tl.load(ids_pointer + token) - row_start
    here = (row >= 0) & (row < vocabulary)
    x = tl.load(weight_pointer + row * weight_row + column, mask=mask & here, other=0.0).to(tl.float32)
    tl.store(y_pointer + token * width + column, (x * scale).to(y_pointer.dtype.element_ty), mask=mask)


@triton.jit
def add_kernel(
    sum_pointer,  # [vocabulary, width] fp32
    dy_pointer,  # [tokens, width]
    rows_pointer,  # [tokens] int64, ascending: rows of `sum`; `vocabulary` for ids of other ranks
    order_pointer,  # [tokens] int64: the token index of each entry of `rows`
    scale,
    tokens,
    vocabulary,
    width,
    sum_row,
    dy_row,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per entry of `rows` and per BLOCK_D columns. The program at an id's first entry adds all tokens of
    the id; the others return."""
    blocks = tl.cdiv(width, BLOCK_D)
    position = tl.program_id(0) // blocks
    column = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.load(rows_pointer + position)
    before = tl.load(rows_pointer + position - 1, mask=position > 0, other=-1)
    if (row == before) | (row >= vocabulary):
        return
    total = tl.zeros([BLOCK_D], tl.float32)
    start = position
    found = BLOCK_T
    while found == BLOCK_T:
        at = start + tl.arange(0, BLOCK_T)
        own = tl.load(rows_pointer + at, mask=at < tokens, other=-1) == row
        token = tl.load(order_pointer + at, mask=own, other=0)
        mask = own[:, None] & (column < width)[None, :]
        x = tl.load(dy_pointer + token[:, None] * dy_row + column[None, :], mask=mask, other=0.0)
        total += tl.sum(x.to(tl.float32), 0)
        found = tl.sum(own.to(tl.int32), 0)
        start += BLOCK_T
    at_sum = sum_pointer + row * sum_row + column
    so_far = tl.load(at_sum, mask=column < width, other=0.0)
    tl.store(at_sum, so_far + total * scale, mask=column < width)


def forward(*, ids: Tensor, weight: Tensor, scale: float, row_start: int) -> Tensor:
    """ids [...], weight [V, D] -> [..., D], contiguous."""
    vocabulary, width = weight.shape
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    y = torch.empty(*ids.shape, width, dtype=weight.dtype, device=weight.device)
    with torch.cuda.device_of(weight):
        forward_kernel[(ids.numel() * triton.cdiv(width, BLOCK),)](
            ids_pointer=ids.contiguous(),
            weight_pointer=weight,
            y_pointer=y,
            scale=scale,
            row_start=row_start,
            vocabulary=vocabulary,
            weight_row=weight.stride(0),
            width=width,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return y


def add_gradient_(total: Tensor, *, dy: Tensor, ids: Tensor, scale: float, row_start: int) -> None:
    """total [V, D] fp32: row id - row_start += scale times the row of dy [..., D], for each id of this rank's rows."""
    vocabulary, width = total.shape
    dy = as_rows(dy)
    rows = ids.flatten() - row_start
    rows, order = rows.masked_fill_((rows < 0) | (rows >= vocabulary), vocabulary).sort(stable=True)
    with torch.cuda.device_of(total):
        add_kernel[(rows.numel() * triton.cdiv(width, ADD_COLUMNS),)](
            sum_pointer=total,
            dy_pointer=dy,
            rows_pointer=rows,
            order_pointer=order,
            scale=scale,
            tokens=rows.numel(),
            vocabulary=vocabulary,
            width=width,
            sum_row=total.stride(0),
            dy_row=dy.stride(0),
            BLOCK_T=ADD_TOKENS,
            BLOCK_D=ADD_COLUMNS,
            num_warps=4,
        )
