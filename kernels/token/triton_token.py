"""Products of a few tokens with a weight, at the speed at which the weight is read.

A program owns some rows of the weight. With programmatic dependent launch (dependent_launch.py) it loads them whole
before it waits for the preceding kernel, so that the memory is not idle between kernels.

Up to FEW_ROWS tokens, a program multiplies the tile in its registers by each token; above, tensor cores multiply tiles
by all tokens at once, padded to 16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.dependent_launch import launch_options
from kernels.lightning.tiles import padded

FEW_ROWS = 2
TILE_BYTES, WARPS = 16384, 4  # of weights that a program of `few_rows_kernel` holds: 128 bytes a thread
OUT, SUMMED, STAGES = 16, 256, 4  # tile of `rows_kernel`


@triton.jit
def _scale(x, square_sum_pointer, row, parts, width, eps, AXIS: tl.constexpr, PARTS: tl.constexpr):
    """1 / sqrt(sum of squares / width + eps): of x, or of the `parts` numbers at square_sum_pointer."""
    if square_sum_pointer is None:
        total = tl.sum(x * x, AXIS)
    else:
        part = tl.arange(0, PARTS)
        total = tl.sum(tl.load(square_sum_pointer + row * parts + part, mask=part < parts, other=0.0), 0)
    return tl.rsqrt(total / width + eps)


@triton.jit
def few_rows_kernel(
    x_pointer,  # [B, K]
    weight_pointer,  # [N, K]
    value_pointer,  # [N, K], or None: no gate
    square_sum_pointer,  # [B, P] fp32, or None: the sums of x^2
    residual_pointer,  # [B, N], or None: zero
    y_pointer,  # [B, N]
    x_row,
    residual_row,
    width,  # K
    outs,  # N
    parts,  # P
    eps,
    ROWS: tl.constexpr,  # B
    NORM: tl.constexpr,
    SILU: tl.constexpr,
    OUT: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    n = tl.program_id(0) * OUT + tl.arange(0, OUT)
    k = tl.arange(0, WIDTH)
    held = n < outs
    at = n[:, None].to(tl.int64) * width + k[None, :]
    mask = held[:, None] & (k[None, :] < width)
    weight = tl.load(weight_pointer + at, mask=mask, other=0.0, eviction_policy="evict_first")
    if value_pointer is not None:
        value = tl.load(value_pointer + at, mask=mask, other=0.0, eviction_policy="evict_first")
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    for row in tl.static_range(ROWS):
        x = tl.load(x_pointer + row * x_row + k, mask=k < width, other=0.0).to(tl.float32)
        y = tl.sum(weight.to(tl.float32) * x[None, :], 1)
        if NORM:
            scale = _scale(x, square_sum_pointer, row, parts, width, eps, 0, PARTS)
            y *= scale
        if SILU:
            y *= tl.sigmoid(y)
        if value_pointer is not None:
            other = tl.sum(value.to(tl.float32) * x[None, :], 1)
            if NORM:
                other *= scale
            y *= other
        if residual_pointer is not None:
            y += tl.load(residual_pointer + row * residual_row + n, mask=held, other=0.0).to(tl.float32)
        tl.store(y_pointer + row * outs + n, y.to(y_pointer.dtype.element_ty), mask=held)


@triton.jit
def rows_kernel(
    x_pointer,  # [B, K]
    weight_pointer,  # [N, K]
    value_pointer,  # [N, K], or None: no gate
    square_sum_pointer,  # [B, P] fp32, or None: the sums of x^2
    residual_pointer,  # [B, N], or None: zero
    y_pointer,  # [B, N]
    x_row,
    residual_row,
    width,  # K
    outs,  # N
    parts,  # P
    eps,
    rows,  # B
    NORM: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,  # B, padded
    OUT: tl.constexpr,
    SUMMED: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    n = tl.program_id(0) * OUT + tl.arange(0, OUT)
    row = tl.arange(0, ROWS)
    held, kept = n < outs, row < rows
    y = tl.zeros([OUT, ROWS], tl.float32)
    other = tl.zeros([OUT, ROWS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    for first in tl.range(0, width, SUMMED, num_stages=STAGES):
        k = first + tl.arange(0, SUMMED)
        at = n[:, None].to(tl.int64) * width + k[None, :]
        mask = held[:, None] & (k[None, :] < width)
        x = tl.load(x_pointer + row[None, :] * x_row + k[:, None], mask=kept[None, :] & (k[:, None] < width), other=0.0)
        y = tl.dot(tl.load(weight_pointer + at, mask=mask, other=0.0), x, y, input_precision="ieee")
        if value_pointer is not None:
            other = tl.dot(tl.load(value_pointer + at, mask=mask, other=0.0), x, other, input_precision="ieee")
        if NORM and square_sum_pointer is None:
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, 0)
    if NORM:
        if square_sum_pointer is not None:
            part = tl.arange(0, PARTS)
            at = row[None, :] * parts + part[:, None]
            squares = tl.sum(
                tl.load(square_sum_pointer + at, mask=kept[None, :] & (part[:, None] < parts), other=0.0), 0
            )
        scale = tl.rsqrt(squares / width + eps)[None, :]
        y *= scale
        other *= scale
    if SILU:
        y *= tl.sigmoid(y)
    if value_pointer is not None:
        y *= other
    mask = held[:, None] & kept[None, :]
    if residual_pointer is not None:
        at = row[None, :] * residual_row + n[:, None]
        y += tl.load(residual_pointer + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_pointer + row[None, :] * outs + n[:, None], y.to(y_pointer.dtype.element_ty), mask=mask)


def linear(
    *, x: Tensor, weight: Tensor, eps: float | None, square_sum: Tensor | None, residual: Tensor | None
) -> Tensor:
    """See `token_linear` in op.py."""
    return _launch(x=x, weight=weight, value=None, eps=eps, square_sum=square_sum, residual=residual, silu=False)


def glu(*, x: Tensor, gate: Tensor, value: Tensor, eps: float, act: str) -> Tensor:
    """See `token_glu` in op.py."""
    return _launch(x=x, weight=gate, value=value, eps=eps, square_sum=None, residual=None, silu=act == "silu")


def _launch(
    *,
    x: Tensor,
    weight: Tensor,
    value: Tensor | None,
    eps: float | None,
    square_sum: Tensor | None,
    residual: Tensor | None,
    silu: bool,
) -> Tensor:
    (rows, width), outs = x.shape, weight.shape[0]
    x = x if x.stride(-1) == 1 else x.contiguous()
    residual = residual if residual is None or residual.stride(-1) == 1 else residual.contiguous()
    square_sum = None if square_sum is None else square_sum.to(torch.float32).contiguous()
    y = torch.empty(rows, outs, dtype=x.dtype, device=x.device)
    arguments = {
        "x_pointer": x,
        "weight_pointer": weight,
        "value_pointer": value,
        "square_sum_pointer": square_sum,
        "residual_pointer": residual,
        "y_pointer": y,
        "x_row": x.stride(0),
        "residual_row": 0 if residual is None else residual.stride(0),
        "width": width,
        "outs": outs,
        "parts": 0 if square_sum is None else square_sum.shape[1],
        "eps": 0.0 if eps is None else eps,
        "NORM": eps is not None,
        "SILU": silu,
        "PARTS": 16 if square_sum is None else padded(square_sum.shape[1]),
        "num_warps": WARPS,
        **launch_options(x),
    }
    with torch.cuda.device_of(x):
        if rows <= FEW_ROWS:
            whole = triton.next_power_of_2(width)
            weights = 1 if value is None else 2
            out = max(1, TILE_BYTES // (whole * weight.element_size() * weights))
            few_rows_kernel[(triton.cdiv(outs, out),)](**arguments, ROWS=rows, OUT=out, WIDTH=whole)
        else:
            rows_kernel[(triton.cdiv(outs, OUT),)](
                **arguments, rows=rows, ROWS=16, OUT=OUT, SUMMED=SUMMED, STAGES=STAGES
            )
    return y
