"""Symmetric products in Triton: only tiles on and below the diagonal are made, and each is stored mirrored, too."""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE, DEPTH, WARPS, STAGES = 128, 64, 8, 4  # side of a square tile of the result; columns of X of one product


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
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Tile (i, j), j <= i, of matrix m of alpha X X^T + beta added. Programs [tiles, matrices]."""
    tile, m = tl.program_id(0), tl.program_id(1).to(tl.int64)
    # Tiles are numbered row by row: row i of the triangle begins at i (i + 1) / 2.
    i = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)  # where the root was rounded up
    i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)  # or down
    j = tile - i * (i + 1) // 2
    above = i * TILE + tl.arange(0, TILE)
    left = j * TILE + tl.arange(0, TILE)
    depth = tl.arange(0, DEPTH)
    x_pointer += m * x_matrix
    of_rows = x_pointer + above.to(tl.int64)[:, None] * x_row + depth[None, :] * x_column
    of_columns = x_pointer + left.to(tl.int64)[None, :] * x_row + depth[:, None] * x_column
    sums = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in range(0, columns, DEPTH):
        inside = depth < columns - start
        a = tl.load(of_rows, mask=(above < rows)[:, None] & inside[None, :], other=0.0)
        b = tl.load(of_columns, mask=(left < rows)[None, :] & inside[:, None], other=0.0)
        sums = tl.dot(a, b, sums)
        of_rows += DEPTH * x_column
        of_columns += DEPTH * x_column
    sums *= alpha
    mask = (above < rows)[:, None] & (left < rows)[None, :]
    below = above.to(tl.int64)[:, None] * rows + left[None, :] + m * rows * rows
    if HAS_ADDED:
        sums += beta * tl.load(added_pointer + below, mask=mask, other=0.0).to(tl.float32)
    found = sums.to(out_pointer.dtype.element_ty)
    tl.store(out_pointer + below, found, mask=mask)
    if i != j:
        mirrored = left.to(tl.int64)[None, :] * rows + above[:, None] + m * rows * rows
        tl.store(out_pointer + mirrored, found, mask=mask)


def symmetric_product(x: Tensor, alpha: float = 1.0, added: Tensor | None = None, beta: float = 0.0) -> Tensor:
    """alpha X X^T + beta added, [n, r, r] in x's type, for X = x [n, r, c] of any strides and a symmetric `added`
    [n, r, r], contiguous. Half the FLOPs of the product, and a diagonal of tiles."""
    count, rows, columns = x.shape
    out = x.new_empty(count, rows, rows)
    tiles = triton.cdiv(rows, TILE)
    with torch.cuda.device_of(x):
        symmetric_kernel[(tiles * (tiles + 1) // 2, count)](
            x,
            added,
            out,
            rows,
            columns,
            *x.stride(),
            alpha,
            beta,
            HAS_ADDED=added is not None,
            TILE=TILE,
            DEPTH=DEPTH,
            num_warps=WARPS,
            num_stages=STAGES,
        )
    return out
