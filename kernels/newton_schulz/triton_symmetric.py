"""Symmetric products in Triton: only tiles on and below the diagonal are made, and each is stored mirrored, too."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

HOPPER = 9  # major compute capability from which on tiles are loaded by bulk tensor copies (TMA)


class Tile(NamedTuple):
    """rows x columns of the result, a multiple of `rows` columns; depth: columns of X of one product."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


TILES = {8: Tile(128, 128, 64, 8, 3), HOPPER: Tile(128, 256, 64, 8, 4)}  # major compute capability -> tile


@triton.jit
def symmetric_kernel(
    x,  # X [n, rows, columns], or X^T [n, columns, rows] where TRANSPOSED: a TMA descriptor of tiles of `ROWS` rows of
    other,  # X, and another of tiles of `COLUMNS` rows of X; or pointers to X, both the same
    added_pointer,
    out_pointer,
    rows,
    columns,
    x_matrix,  # strides of X, in elements
    x_row,
    x_column,
    alpha,
    share,  # beta / alpha
    HAS_ADDED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Tile (i, j), j COLUMNS <= i ROWS, of matrix m of alpha X X^T + beta added. Programs [`tiles`, matrices]."""
    tile, matrix = tl.program_id(0), tl.program_id(1)
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
    offset = matrix.to(tl.int64) * rows * rows  # of the result, and of `added`
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    if HAS_ADDED:  # before the products: after them, no registers are left for it
        inside = (down < rows)[:, None] & (across < rows)[None, :]
        added = tl.load(added_pointer + offset + (down[:, None] * rows + across[None, :]), mask=inside, other=0.0)
        sums += share * added.to(tl.float32)
    depth = tl.arange(0, DEPTH)
    if not DESCRIPTORS:
        x += matrix.to(tl.int64) * x_matrix
        of_rows = x + (down[:, None] * x_row + depth[None, :] * x_column)
        of_columns = x + (across[None, :] * x_row + depth[:, None] * x_column)
    for start in range(0, columns, DEPTH):
        if DESCRIPTORS and TRANSPOSED:
            a = x.load([matrix, start, i * ROWS]).reshape(DEPTH, ROWS).T
            b = other.load([matrix, start, j * COLUMNS]).reshape(DEPTH, COLUMNS)
        elif DESCRIPTORS:
            a = x.load([matrix, i * ROWS, start]).reshape(ROWS, DEPTH)
            b = other.load([matrix, j * COLUMNS, start]).reshape(COLUMNS, DEPTH).T
        else:
            held = depth < columns - start
            a = tl.load(of_rows, mask=(down < rows)[:, None] & held[None, :], other=0.0)
            b = tl.load(of_columns, mask=(across < rows)[None, :] & held[:, None], other=0.0)
            of_rows += DEPTH * x_column
            of_columns += DEPTH * x_column
        sums = tl.dot(a, b, sums)
    # Elements above the diagonal are mirrored ones: each is stored once, and the result is symmetric bit for bit.
    lower = (across[None, :] <= down[:, None]) & (down < rows)[:, None]
    below = down[:, None] * rows + across[None, :]
    found = (alpha * sums).to(out_pointer.dtype.element_ty)
    tl.store(out_pointer + offset + below, found, mask=lower)
    mirrored = across[None, :] * rows + down[:, None]
    tl.store(out_pointer + offset + mirrored, found, mask=lower & (across[None, :] < down[:, None]))


def tiles(rows: int, tile: Tile) -> int:
    """Number of tiles of a result [rows, rows] that hold an element on or below the diagonal."""
    ratio = tile.columns // tile.rows
    return sum(i // ratio + 1 for i in range(triton.cdiv(rows, tile.rows)))


def symmetric_product(x: Tensor, alpha: float = 1.0, added: Tensor | None = None, beta: float = 0.0) -> Tensor:
    """alpha X X^T + beta added, [n, r, r] in x's type, for X = x [n, r, c] of any strides and a symmetric `added`
    [n, r, r], contiguous."""
    count, rows, columns = x.shape
    out = x.new_empty(count, rows, rows)
    capability = min(torch.cuda.get_device_capability(x.device)[0], HOPPER) if x.is_cuda else HOPPER
    tile = TILES[capability]
    transposed = x.stride(1) == 1 and x.stride(2) > 1
    stored = x.mT if transposed else x
    described = capability >= HOPPER and stored.is_contiguous() and stored.shape[2] % 8 == stored.data_ptr() % 16 == 0
    blocks = [(1, tile.depth, side) if transposed else (1, side, tile.depth) for side in (tile.rows, tile.columns)]
    operands = [TensorDescriptor.from_tensor(stored, list(block)) if described else x for block in blocks]
    with torch.cuda.device_of(x):
        symmetric_kernel[(tiles(rows, tile), count)](
            *operands,
            added,
            out,
            rows,
            columns,
            *x.stride(),
            alpha,
            beta / alpha,
            HAS_ADDED=added is not None,
            DESCRIPTORS=described,
            TRANSPOSED=transposed,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            DEPTH=tile.depth,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out
