"""Products of a few rows with a weight in fp8, and copies of the weight in a wider type for more rows.

A program multiplies OUT rows of the weight with ROWS rows of x, over a part of K: few rows of x leave too few tiles to
keep every multiprocessor reading. Parts of K are summed by a second kernel, in their order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    out: int
    depth: int  # columns of K that a program reads at a time
    stages: int
    warps: int = 4
    programs: int = 264  # wanted number of programs, reached by splitting K; two for each of an H200's multiprocessors


# ROWS of x in a program -> the tile that was fastest on an H200 (docs/measurements/2026-11-30.md).
TILES = {16: Tile(out=64, depth=256, stages=3), 32: Tile(64, 128, 4), 64: Tile(64, 128, 4)}
SUMS = 1024  # elements that a program of the second kernel sums
COPIED = 2048  # elements that a program copies


@triton.jit
def linear_kernel(
    x_pointer,  # [T, K]
    data_pointer,  # [N, K] e4m3
    scale_pointer,  # [N] fp32; None: y is not scaled
    y_pointer,  # [parts, T, N]
    rows,  # T
    outs,  # N
    width,  # K
    length,  # columns of K in a part, a multiple of DEPTH
    OUT: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    n = tl.program_id(0) * OUT + tl.arange(0, OUT)
    t = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(2)
    within = tl.arange(0, DEPTH)
    sums = tl.zeros([OUT, ROWS], dtype=tl.float32)
    for start in range(part * length, tl.minimum((part + 1) * length, width), DEPTH):
        k = start + within
        at = n[:, None].to(tl.int64) * width + k[None, :]
        data = tl.load(data_pointer + at, mask=(n < outs)[:, None] & (k < width)[None, :], other=0.0)
        x = tl.load(
            x_pointer + t[None, :] * width + k[:, None], mask=(t < rows)[None, :] & (k < width)[:, None], other=0.0
        )
        sums = tl.dot(data.to(x.dtype), x, sums, input_precision="ieee")
    if scale_pointer is not None:
        sums *= tl.load(scale_pointer + n, mask=n < outs, other=0.0)[:, None]
    at = (part * rows + t[None, :]).to(tl.int64) * outs + n[:, None]
    tl.store(y_pointer + at, sums.to(y_pointer.dtype.element_ty), mask=(t < rows)[None, :] & (n < outs)[:, None])


@triton.jit
def sum_kernel(
    parts_pointer,  # [parts, T, N] fp32
    scale_pointer,  # [N] fp32
    y_pointer,  # [T, N]
    count,  # T N
    outs,  # N
    PARTS: tl.constexpr,
    SUMS: tl.constexpr,
):
    at = tl.program_id(0) * SUMS + tl.arange(0, SUMS)
    held = at < count
    total = tl.zeros([SUMS], dtype=tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts_pointer + part * count + at, mask=held, other=0.0)
    total *= tl.load(scale_pointer + at % outs, mask=held, other=0.0)
    tl.store(y_pointer + at, total.to(y_pointer.dtype.element_ty), mask=held)


@triton.jit
def copy_kernel(
    data_pointer,  # [N, K] e4m3
    scale_pointer,  # [N] fp32
    copy_pointer,  # [N, K]
    width,  # K
    COPIED: tl.constexpr,
):
    n, k = tl.program_id(0), tl.program_id(1) * COPIED + tl.arange(0, COPIED)
    at = n.to(tl.int64) * width + k
    data = tl.load(data_pointer + at, mask=k < width, other=0.0).to(tl.float32)
    copy = data * tl.load(scale_pointer + n)
    tl.store(copy_pointer + at, copy.to(copy_pointer.dtype.element_ty), mask=k < width)


def dequantized(data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """scale * data [N, K] in `dtype`."""
    outs, width = data.shape
    copy = torch.empty(outs, width, dtype=dtype, device=data.device)
    with torch.cuda.device_of(data):
        copy_kernel[(outs, triton.cdiv(width, COPIED))](
            data_pointer=data, scale_pointer=scale, copy_pointer=copy, width=width, COPIED=COPIED, num_warps=4
        )
    return copy


def linear(x: Tensor, data: Tensor, scale: Tensor, tile: Tile | None = None) -> Tensor:
    """x [T, K], data [N, K], scale [N] -> [T, N]; see `float8_linear` in op.py."""
    (rows, width), outs = x.shape, data.shape[0]
    if not rows:
        return x.new_empty(0, outs)
    block = min(max(triton.next_power_of_2(rows), min(TILES)), max(TILES))
    tile = tile or TILES[block]
    across, down = triton.cdiv(outs, tile.out), triton.cdiv(rows, block)
    most = max(width // (2 * tile.depth), 1)
    parts = min(max(1 << (tile.programs // (across * down)).bit_length() >> 1, 1), 1 << most.bit_length() >> 1)
    length = triton.cdiv(triton.cdiv(width, parts), tile.depth) * tile.depth
    y = torch.empty(rows, outs, dtype=x.dtype, device=x.device)
    into = y if parts == 1 else torch.empty(parts, rows, outs, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        linear_kernel[(across, down, parts)](
            x_pointer=x,
            data_pointer=data,
            scale_pointer=scale if parts == 1 else None,
            y_pointer=into,
            rows=rows,
            outs=outs,
            width=width,
            length=length,
            OUT=tile.out,
            ROWS=block,
            DEPTH=tile.depth,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        if parts > 1:
            sum_kernel[(triton.cdiv(y.numel(), SUMS),)](
                parts_pointer=into,
                scale_pointer=scale,
                y_pointer=y,
                count=y.numel(),
                outs=outs,
                PARTS=parts,
                SUMS=SUMS,
                num_warps=4,
            )
    return y
