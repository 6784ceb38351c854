"""Symmetric products in Triton: tiles on and below the diagonal are made, and those below are stored mirrored, too."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.dispatch import HOPPER, capability_of


class Tile(NamedTuple):
    """rows x columns of the result, with columns a multiple of rows; depth: columns of X that one tl.dot reads."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


TILES = {8: Tile(128, 128, 64, 8, 3), HOPPER: Tile(128, 256, 64, 8, 4)}  # major compute capability -> tile


@triton.jit
def symmetric_kernel(
    x,  # X [n, rows, depth], or X^T where X_TRANSPOSED: a TMA descriptor, of tiles [ROWS, DEPTH] of X
    y,  # Y [n, depth, rows], or Y^T where Y_TRANSPOSED, of tiles [DEPTH, COLUMNS] of Y
    added,  # [n, rows, rows], of tiles [ROWS, COLUMNS]; or None
    out,  # [n, rows, rows], of tiles [ROWS, COLUMNS]
    mirrored,  # `out`, of tiles [COLUMNS, ROWS]. Without DESCRIPTORS, these five are pointers
    rows,
    depth,
    x_matrix,  # strides in elements
    x_row,
    x_column,
    y_matrix,
    y_row,
    y_column,
    alpha,
    share,  # beta / alpha
    DESCRIPTORS: tl.constexpr,
    X_TRANSPOSED: tl.constexpr,
    Y_TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Tile (i, j), j COLUMNS <= i ROWS, of matrix m of alpha X Y + beta added. Programs [`tiles`, matrices]."""
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
    along = tl.arange(0, DEPTH)
    if not DESCRIPTORS:
        x_at = x + matrix.to(tl.int64) * x_matrix + (down[:, None] * x_row + along[None, :] * x_column)
        y_at = y + matrix.to(tl.int64) * y_matrix + (along[:, None] * y_row + across[None, :] * y_column)
    for start in range(0, depth, DEPTH):
        if DESCRIPTORS:
            if X_TRANSPOSED:
                a = x.load([matrix, start, i * ROWS]).reshape(DEPTH, ROWS).T
            else:
                a = x.load([matrix, i * ROWS, start]).reshape(ROWS, DEPTH)
            if Y_TRANSPOSED:
                b = y.load([matrix, j * COLUMNS, start]).reshape(COLUMNS, DEPTH).T
            else:
                b = y.load([matrix, start, j * COLUMNS]).reshape(DEPTH, COLUMNS)
        else:
            held = along < depth - start
            a = tl.load(x_at, mask=(down < rows)[:, None] & held[None, :], other=0.0)
            b = tl.load(y_at, mask=(across < rows)[None, :] & held[:, None], other=0.0)
            x_at += DEPTH * x_column
            y_at += DEPTH * y_row
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
    x: Tensor, y: Tensor, alpha: float = 1.0, added: Tensor | None = None, beta: float = 0.0
) -> Tensor:
    """alpha X Y + beta added, [n, r, r] in x's type, where that is symmetric up to rounding: X = x [n, r, c] and Y = y
    [n, c, r], of any strides; `added` [n, r, r] is contiguous."""
    count, rows, depth = x.shape
    out = x.new_empty(count, rows, rows)
    capability = min(capability_of(x), HOPPER)
    tile = TILES[capability]
    x_transposed, y_transposed = not x.is_contiguous(), not y.is_contiguous()
    stored = (x.mT if x_transposed else x, y.mT if y_transposed else y, added, out, out)
    described = capability >= HOPPER and all(tensor is None or _has_descriptors(tensor) for tensor in stored)
    operands: list = [x, y, added, out, out]
    if described:
        of_x, of_y, square = (tile.rows, tile.depth), (tile.depth, tile.columns), (tile.rows, tile.columns)
        blocks = (of_x[::-1] if x_transposed else of_x, of_y[::-1] if y_transposed else of_y)
        operands = [
            None if tensor is None else TensorDescriptor.from_tensor(tensor, [1, *block])
            for tensor, block in zip(stored, (*blocks, square, square, square[::-1]), strict=True)
        ]
    with torch.cuda.device_of(x):
        symmetric_kernel[(tiles(rows, tile), count)](
            *operands,
            rows,
            depth,
            *x.stride(),
            *y.stride(),
            alpha,
            beta / alpha,
            DESCRIPTORS=described,
            X_TRANSPOSED=x_transposed,
            Y_TRANSPOSED=y_transposed,
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
