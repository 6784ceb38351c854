"""Symmetric products in Triton: tiles on and below the diagonal are made, and those below are stored mirrored, too."""

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
    x,  # X [n, rows, columns], or X^T [n, columns, rows] where TRANSPOSED: a TMA descriptor, tiles of `ROWS` rows of X
    y,  # Y, likewise, of tiles of `COLUMNS` rows of Y
    added,  # [n, rows, rows], of tiles [ROWS, COLUMNS]; or None
    out,  # [n, rows, rows], of tiles [ROWS, COLUMNS]
    mirrored,  # `out`, of tiles [COLUMNS, ROWS]. Without DESCRIPTORS, these five are pointers
    rows,
    columns,
    x_matrix,  # strides of X and Y, in elements
    x_row,
    x_column,
    alpha,
    share,  # beta / alpha
    DESCRIPTORS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Tile (i, j), j COLUMNS <= i ROWS, of matrix m of alpha X Y^T + beta added. Programs [`tiles`, matrices]."""
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
    inside = (down < rows)[:, None] & (across < rows)[None, :]
    at = offset + (down[:, None] * rows + across[None, :])
    if added is not None:  # before the products: after them, no registers are left for it
        if DESCRIPTORS:
            share_of = added.load([matrix, i * ROWS, j * COLUMNS]).reshape(ROWS, COLUMNS)
        else:
            share_of = tl.load(added + at, mask=inside, other=0.0)
        sums += share * share_of.to(tl.float32)
    depth = tl.arange(0, DEPTH)
    if not DESCRIPTORS:
        begin = matrix.to(tl.int64) * x_matrix
        of_rows = x + begin + (down[:, None] * x_row + depth[None, :] * x_column)
        of_columns = y + begin + (across[None, :] * x_row + depth[:, None] * x_column)
    for start in range(0, columns, DEPTH):
        if DESCRIPTORS and TRANSPOSED:
            a = x.load([matrix, start, i * ROWS]).reshape(DEPTH, ROWS).T
            b = y.load([matrix, start, j * COLUMNS]).reshape(DEPTH, COLUMNS)
        elif DESCRIPTORS:
            a = x.load([matrix, i * ROWS, start]).reshape(ROWS, DEPTH)
            b = y.load([matrix, j * COLUMNS, start]).reshape(COLUMNS, DEPTH).T
        else:
            held = depth < columns - start
            a = tl.load(of_rows, mask=(down < rows)[:, None] & held[None, :], other=0.0)
            b = tl.load(of_columns, mask=(across < rows)[None, :] & held[:, None], other=0.0)
            of_rows += DEPTH * x_column
            of_columns += DEPTH * x_column
        sums = tl.dot(a, b, sums)
    # The tiles of group g with j = g make a whole square on the diagonal; those with j < g lie below it.
    if DESCRIPTORS:
        found = (alpha * sums).to(out.dtype)
        out.store([matrix, i * ROWS, j * COLUMNS], found.reshape(1, ROWS, COLUMNS))
        if j < g:
            mirrored.store([matrix, j * COLUMNS, i * ROWS], found.T.reshape(1, COLUMNS, ROWS))
    else:
        found = (alpha * sums).to(out.dtype.element_ty)
        tl.store(out + at, found, mask=inside)
        mirror = offset + (across[None, :] * rows + down[:, None])
        tl.store(out + mirror, found, mask=inside & (j < g))


def tiles(rows: int, tile: Tile) -> int:
    """Number of tiles of a result [rows, rows] that hold an element on or below the diagonal."""
    ratio = tile.columns // tile.rows
    return sum(i // ratio + 1 for i in range(triton.cdiv(rows, tile.rows)))


def symmetric_product(
    x: Tensor, y: Tensor | None = None, alpha: float = 1.0, added: Tensor | None = None, beta: float = 0.0
) -> Tensor:
    """alpha X Y^T + beta added, [n, r, r] in x's type, where that is symmetric: X = x and Y = y [n, r, c], of any
    strides, the same for both; `added` [n, r, r] is symmetric and contiguous. y: None for x."""
    y = x if y is None else y
    count, rows, columns = x.shape
    out = x.new_empty(count, rows, rows)
    capability = min(torch.cuda.get_device_capability(x.device)[0], HOPPER) if x.is_cuda else HOPPER
    tile = TILES[capability]
    transposed = x.stride(1) == 1 and x.stride(2) > 1
    stored, stored_y = (x.mT, y.mT) if transposed else (x, y)
    described = capability >= HOPPER and all(map(_has_descriptors, (stored, stored_y, out)))
    operands = [x, y, added, out, out]
    if described:
        of_rows, of_columns, square = (tile.rows, tile.depth), (tile.columns, tile.depth), (tile.rows, tile.columns)
        if transposed:
            of_rows, of_columns = of_rows[::-1], of_columns[::-1]
        blocks = (of_rows, of_columns, square, square, square[::-1])
        operands = [
            None if tensor is None else TensorDescriptor.from_tensor(tensor, [1, *block])
            for tensor, block in zip((stored, stored_y, added, out, out), blocks, strict=True)
        ]
    with torch.cuda.device_of(x):
        symmetric_kernel[(tiles(rows, tile), count)](
            *operands,
            rows,
            columns,
            *x.stride(),
            alpha,
            beta / alpha,
            DESCRIPTORS=described,
            TRANSPOSED=transposed,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            DEPTH=tile.depth,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out


def _has_descriptors(tensor: Tensor) -> bool:
    """Bulk tensor copies need contiguous rows of whole 16 bytes."""
    return tensor.is_contiguous() and tensor.shape[-1] % 8 == tensor.data_ptr() % 16 == 0
