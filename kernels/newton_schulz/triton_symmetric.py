"""Symmetric products in Triton: only tiles on and below the diagonal are made, and each is stored mirrored, too."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    """rows x columns of the result, a multiple of `rows` columns; depth: columns of X of one product."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


TILES = {8: Tile(128, 128, 64, 8, 3), 9: Tile(128, 128, 64, 8, 4)}  # major compute capability -> tile


@triton.jit
def symmetric_kernel(
    x_pointer,
    added_pointer,
    out_pointer,
    rows,
    columns,
    x_matrix,  # strides, in elements
    x_row,
    x_column,
    alpha,
    beta,
    HAS_ADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Tile (i, j), j COLUMNS <= i ROWS, of matrix m of alpha X X^T + beta added. Programs [`tiles`, matrices]."""
    tile, m = tl.program_id(0), tl.program_id(1).to(tl.int64)
    # Rows of tiles come in groups of `ratio` with equally many tiles, g + 1 in group g, which begins at
    # ratio g (g + 1) / 2.
    ratio: tl.constexpr = COLUMNS // ROWS
    g = ((tl.sqrt(8.0 * (tile // ratio).to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    g = tl.where(ratio * (g * (g + 1) // 2) > tile, g - 1, g)  # where the root was rounded up
    g = tl.where(ratio * ((g + 1) * (g + 2) // 2) <= tile, g + 1, g)  # or down
    within = tile - ratio * (g * (g + 1) // 2)
    i, j = g * ratio + within // (g + 1), within % (g + 1)
    down = i * ROWS + tl.arange(0, ROWS)
    across = j * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    x_pointer += m * x_matrix
    of_rows = x_pointer + down.to(tl.int64)[:, None] * x_row + depth[None, :] * x_column
    of_columns = x_pointer + across.to(tl.int64)[None, :] * x_row + depth[:, None] * x_column
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, columns, DEPTH):
        inside = depth < columns - start
        a = tl.load(of_rows, mask=(down < rows)[:, None] & inside[None, :], other=0.0)
        b = tl.load(of_columns, mask=(across < rows)[None, :] & inside[:, None], other=0.0)
        sums = tl.dot(a, b, sums)
        of_rows += DEPTH * x_column
        of_columns += DEPTH * x_column
    sums *= alpha
    # Elements above the diagonal are mirrored ones: each is stored once, and the result is symmetric bit for bit.
    lower = (across[None, :] <= down[:, None]) & (down < rows)[:, None]
    below = down.to(tl.int64)[:, None] * rows + across[None, :] + m * rows * rows
    if HAS_ADDED:
        sums += beta * tl.load(added_pointer + below, mask=lower, other=0.0).to(tl.float32)
    found = sums.to(out_pointer.dtype.element_ty)
    tl.store(out_pointer + below, found, mask=lower)
    mirrored = across.to(tl.int64)[None, :] * rows + down[:, None] + m * rows * rows
    tl.store(out_pointer + mirrored, found, mask=lower & (across[None, :] < down[:, None]))


def tiles(rows: int, tile: Tile) -> int:
    """Number of tiles of a result [rows, rows] that hold an element on or below the diagonal."""
    ratio = tile.columns // tile.rows
    return sum(i // ratio + 1 for i in range(triton.cdiv(rows, tile.rows)))


def symmetric_product(x: Tensor, alpha: float = 1.0, added: Tensor | None = None, beta: float = 0.0) -> Tensor:
    """alpha X X^T + beta added, [n, r, r] in x's type, for X = x [n, r, c] of any strides and a symmetric `added`
    [n, r, r], contiguous."""
    count, rows, columns = x.shape
    out = x.new_empty(count, rows, rows)
    tile = TILES[min(torch.cuda.get_device_capability(x.device)[0], max(TILES)) if x.is_cuda else min(TILES)]
    with torch.cuda.device_of(x):
        symmetric_kernel[(tiles(rows, tile), count)](
            x,
            added,
            out,
            rows,
            columns,
            *x.stride(),
            alpha,
            beta,
            HAS_ADDED=added is not None,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            DEPTH=tile.depth,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out
