"""Products of one token with a weight, at the speed at which the weight is read.

A program owns some rows of the weight. With programmatic dependent launch (dependent_launch.py) it loads them whole
before it waits for the preceding kernel, so that the memory is not idle between kernels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.activations.triton_activations import ACTIVATIONS, activate
from kernels.dependent_launch import launch_options
from kernels.lightning.tiles import padded

TILE_BYTES, WARPS = 16384, 4  # weights that a program holds: 128 bytes a thread
# Wider fp8 weights are read in pieces of several rows: a program that holds one row converts as many elements of x.
FLOAT8_WIDTH, FLOAT8_PIECE, FLOAT8_BYTES = 4096, 2048, 8192


@triton.jit
def token_kernel(
    x_pointer,  # [K]
    weight_pointer,  # [N, K]
    value_pointer,  # [N, K], or None: no gate
    weight_scale_pointer,  # [N] fp32, or None: 1
    value_scale_pointer,  # [N] fp32, or None: 1
    square_sum_pointer,  # [P] fp32, or None: the sum of x^2
    residual_pointer,  # [N], or None: zero
    y_pointer,  # [N]
    width,  # K
    outs,  # N
    parts,  # P
    eps,
    NORM: tl.constexpr,
    ACT: tl.constexpr,
    OUT: tl.constexpr,
    WIDTH: tl.constexpr,  # columns of the weight that a program holds
    PIECES: tl.constexpr,  # of so many columns that it reads
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
    x = tl.load(x_pointer + k, mask=k < width, other=0.0).to(tl.float32)
    squares = x * x
    if PIECES > 1:
        weighted = weight.to(tl.float32) * x[None, :]
        if value_pointer is not None:
            valued = value.to(tl.float32) * x[None, :]
    for _ in tl.static_range(1, PIECES):
        k += WIDTH
        at = n[:, None].to(tl.int64) * width + k[None, :]
        mask = held[:, None] & (k[None, :] < width)
        weight = tl.load(weight_pointer + at, mask=mask, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_pointer + k, mask=k < width, other=0.0).to(tl.float32)
        squares += x * x
        weighted += weight.to(tl.float32) * x[None, :]
        if value_pointer is not None:
            value = tl.load(value_pointer + at, mask=mask, other=0.0, eviction_policy="evict_first")
            valued += value.to(tl.float32) * x[None, :]
    scale = 1.0
    if NORM:
        if square_sum_pointer is not None:
            part = tl.arange(0, PARTS)
            total = tl.sum(tl.load(square_sum_pointer + part, mask=part < parts, other=0.0), 0)
        else:
            total = tl.sum(squares, 0)
        scale = tl.rsqrt(total / width + eps)
    if PIECES == 1:  # not above: the sum of squares would have fewer registers
        weighted = weight.to(tl.float32) * x[None, :]
    y = tl.sum(weighted, 1) * scale
    if weight_scale_pointer is not None:
        y *= tl.load(weight_scale_pointer + n, mask=held, other=0.0)
    y = activate(y, ACT, QUICK=False)
    if value_pointer is not None:
        if PIECES == 1:
            valued = value.to(tl.float32) * x[None, :]
        y *= tl.sum(valued, 1) * scale
    if value_scale_pointer is not None:
        y *= tl.load(value_scale_pointer + n, mask=held, other=0.0)
    if residual_pointer is not None:
        y += tl.load(residual_pointer + n, mask=held, other=0.0).to(tl.float32)
    tl.store(y_pointer + n, y.to(y_pointer.dtype.element_ty), mask=held)


def linear(
    *,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    eps: float | None,
    square_sum: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """See `token_linear` in op.py."""
    scales = weight_scale, None
    return _launch(
        x=x, weight=weight, value=None, scales=scales, eps=eps, square_sum=square_sum, residual=residual, act="none"
    )


def glu(
    *,
    x: Tensor,
    gate: Tensor,
    value: Tensor,
    gate_scale: Tensor | None,
    value_scale: Tensor | None,
    eps: float,
    act: str,
) -> Tensor:
    """See `token_glu` in op.py."""
    scales = gate_scale, value_scale
    return _launch(x=x, weight=gate, value=value, scales=scales, eps=eps, square_sum=None, residual=None, act=act)


def _launch(
    *,
    x: Tensor,
    weight: Tensor,
    value: Tensor | None,
    scales: tuple[Tensor | None, Tensor | None],
    eps: float | None,
    square_sum: Tensor | None,
    residual: Tensor | None,
    act: str,
) -> Tensor:
    width, outs = x.shape[0], weight.shape[0]
    narrow = weight.element_size() == 1 and width > FLOAT8_WIDTH
    whole = FLOAT8_PIECE if narrow else triton.next_power_of_2(width)
    row_bytes = whole * weight.element_size() * (1 if value is None else 2)
    out = max(1, (FLOAT8_BYTES if narrow else TILE_BYTES) // row_bytes)
    y = torch.empty(outs, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        token_kernel[(triton.cdiv(outs, out),)](
            x_pointer=x.contiguous(),
            weight_pointer=weight,
            value_pointer=value,
            weight_scale_pointer=scales[0],
            value_scale_pointer=scales[1],
            square_sum_pointer=None if square_sum is None else square_sum.to(torch.float32).contiguous(),
            residual_pointer=None if residual is None else residual.contiguous(),
            y_pointer=y,
            width=width,
            outs=outs,
            parts=0 if square_sum is None else square_sum.shape[0],
            eps=0.0 if eps is None else eps,
            NORM=eps is not None,
            ACT=ACTIVATIONS[act],
            OUT=out,
            WIDTH=whole,
            PIECES=triton.cdiv(width, whole),
            PARTS=16 if square_sum is None else padded(square_sum.shape[0]),
            num_warps=WARPS,
            **launch_options(x),
        )
    return y
