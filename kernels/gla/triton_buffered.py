"""One buffered decoding step in one kernel: a program owns one head's state.

It reads the state, ROWS of its K rows at a time with the loads of the next ones under way, and the head's buffer, and
computes o. The step that folds adds the buffer to the rows first, one key and value at a time (W of them are too few
for a product of matrices), writes the rows, and o is then q S. Memory traffic per element of the state: 4 bytes, 8 in
the step that folds; and a buffer of W / d of the state's elements, in the type of qkvu.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.activations.triton_activations import ACTIVATIONS, activate
from kernels.dependent_launch import launch_options
from kernels.dispatch import capability_of
from kernels.gla.inputs import GlaInputs
from kernels.gla.step_buffer import StepBuffer
from kernels.gla.triton_features import turn_of
from kernels.lightning.tiles import padded


class Tile(NamedTuple):
    """rows: of the state that a program reads at a time. stages: such loads under way."""

    rows: int
    warps: int
    stages: int


# Major compute capability -> by whether the step folds. One warp reduces o without shared memory; of 48 tiles, and of
# 108 for the fold, the fastest on an H200 (docs/measurements/2026-11-29.md and 2026-11-30.md). On Ampere the fold's 8
# rows would need more registers than there are.
TILES = {
    8: {False: Tile(rows=8, warps=1, stages=3), True: Tile(rows=4, warps=1, stages=3)},
    9: {False: Tile(rows=8, warps=1, stages=3), True: Tile(rows=8, warps=1, stages=2)},
}


@triton.jit
def buffered_step_kernel(
    x_pointer,  # [B, 4 H d]: q | k | v | u
    theta_pointer,  # [H d], or None: no LRPE
    positions_pointer,  # [B] or [1], or None: 0
    decay_pointer,  # [H] fp32
    state_pointer,  # [B, H, K, d] fp32
    keys_pointer,  # [B, H, W, K]
    values_pointer,  # [B, H, W, d]
    slot_pointer,  # [1] int64
    start_pointer,  # [B] int64
    y_pointer,  # [B, H d]
    sums_pointer,  # [B, H] fp32: each head's sum of o^2
    x_row,
    positions_row,
    heads,
    width,  # d
    summed_width,  # K: d, or 2 d with LRPE
    ACT: tl.constexpr,
    QUICK: tl.constexpr,
    GATE: tl.constexpr,
    FOLD: tl.constexpr,
    BUFFERED: tl.constexpr,  # W
    SLOTS: tl.constexpr,  # W, padded
    WIDTH: tl.constexpr,  # d, padded
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    row_head = tl.program_id(0).to(tl.int64)
    row = row_head // heads
    head = row_head % heads
    j = tl.arange(0, SLOTS)
    column = tl.arange(0, WIDTH)
    wanted = column < width
    slot = tl.load(slot_pointer).to(tl.int32)
    start = tl.load(start_pointer + row).to(tl.int32)
    rate = tl.load(decay_pointer + head)
    x = x_pointer + row * x_row + head * width
    part = heads * width

    # The current token takes its slot; the slots not in use may hold anything, NaN too.
    earlier = (j >= start) & (j < slot)
    current = j == slot
    before = tl.exp(-rate * (slot + 1 - start).to(tl.float32))
    v = tl.load(x + 2 * part + column, mask=wanted, other=0.0)
    values_at = values_pointer + row_head * BUFFERED * width
    if not FOLD:
        values = tl.load(
            values_at + j[:, None] * width + column[None, :], mask=earlier[:, None] & wanted[None, :], other=0.0
        )
        values = tl.where(current[:, None], v[None, :], values)
    tl.store(values_at + slot * width + column, v, mask=wanted)

    keys_at = keys_pointer + row_head * BUFFERED * summed_width
    state_at = state_pointer + row_head * summed_width * width
    o = tl.zeros([ROWS, WIDTH], tl.float32)  # parts of q S
    scores = tl.zeros([SLOTS, ROWS], tl.float32)  # parts of q . k_j
    for first in tl.range(0, summed_width, ROWS, num_stages=STAGES):
        feature = first + tl.arange(0, ROWS)
        held = feature < summed_width
        source = tl.where(feature < width, feature, feature - width)  # LRPE: cosine half, then sine half
        at = state_at + feature[:, None] * width + column[None, :]
        mask = held[:, None] & wanted[None, :]
        state = tl.load(at, mask=mask, other=0.0)
        q = activate(tl.load(x + source, mask=held, other=0.0).to(tl.float32), ACT, QUICK)
        k = activate(tl.load(x + part + source, mask=held, other=0.0).to(tl.float32), ACT, QUICK)
        if theta_pointer is not None:
            theta_at = theta_pointer + head * width
            turn = turn_of(theta_at, positions_pointer, positions_row, row, feature, source, held, QUICK, ROWS)
            q *= turn
            k *= turn
        q = tl.where(held, q, 0.0)
        # Rounded to the buffer's type first: a fold adds the keys that are stored, this one included, to the state.
        k = tl.where(held, k, 0.0).to(keys_pointer.dtype.element_ty)
        tl.store(keys_at + slot * summed_width + feature, k, mask=held)
        if FOLD:
            state = state * before + k.to(tl.float32)[:, None] * v.to(tl.float32)[None, :]
            for older in tl.static_range(BUFFERED - 1):
                used = older >= start
                age = tl.exp(-rate * (BUFFERED - 1 - older))
                key = tl.load(keys_at + older * summed_width + feature, mask=held & used, other=0.0).to(tl.float32)
                value = tl.load(values_at + older * width + column, mask=wanted & used, other=0.0).to(tl.float32)
                state += (key * age)[:, None] * value[None, :]
            tl.store(at, state, mask=mask)
        else:
            keys = tl.load(
                keys_at + j[:, None] * summed_width + feature[None, :], mask=earlier[:, None] & held[None, :], other=0.0
            )
            keys = tl.where(current[:, None], k[None, :], keys)
            scores += keys.to(tl.float32) * q[None, :]
        o += state * q[:, None]

    o = tl.sum(o, 0)
    if not FOLD:
        age = tl.exp(-rate * tl.where(earlier, slot - j, 0).to(tl.float32))
        weights = tl.sum(scores, 1) * tl.where(earlier | current, age, 0.0)
        o = before * o + tl.sum(values.to(tl.float32) * weights[:, None], 0)
    tl.store(sums_pointer + row_head, tl.sum(o * o, 0))
    if GATE:
        o *= tl.load(x + 3 * part + column, mask=wanted, other=0.0).to(tl.float32)
    tl.store(y_pointer + row_head * width + column, o.to(y_pointer.dtype.element_ty), mask=wanted)


def constants(tile: Tile, width: int, slots: int) -> dict[str, int]:
    """The kernel's sizes for states [K, d = width] and W = slots."""
    sizes = {"BUFFERED": slots, "SLOTS": padded(slots), "WIDTH": padded(width)}
    return sizes | {"ROWS": tile.rows, "STAGES": tile.stages}


def step(inputs: GlaInputs, buffer: StepBuffer) -> tuple[Tensor, Tensor]:
    """See `gla_step_buffered_` in buffered.py."""
    qkvu, theta, positions = inputs.qkvu, inputs.theta, inputs.positions
    batch, _, fused = qkvu.shape
    _, heads, summed, width = buffer.state.shape
    tile = TILES[min(capability_of(qkvu), max(TILES))][buffer.fold]
    y = torch.empty(batch, 1, fused // 4, dtype=qkvu.dtype, device=qkvu.device)
    sums = torch.empty(batch, 1, heads, dtype=torch.float32, device=qkvu.device)
    with torch.cuda.device_of(qkvu):
        buffered_step_kernel[(batch * heads,)](
            x_pointer=qkvu,
            theta_pointer=None if theta is None else theta.contiguous(),
            positions_pointer=positions,
            decay_pointer=inputs.decay.to(torch.float32).contiguous(),
            state_pointer=buffer.state,
            keys_pointer=buffer.keys,
            values_pointer=buffer.values,
            slot_pointer=buffer.slot,
            start_pointer=buffer.start,
            y_pointer=y,
            sums_pointer=sums,
            x_row=qkvu.stride(0),
            positions_row=0 if positions is None or positions.numel() == 1 else positions.stride(0),
            heads=heads,
            width=width,
            summed_width=summed,
            ACT=ACTIVATIONS[inputs.act],
            QUICK=qkvu.dtype == torch.bfloat16,
            GATE=inputs.gate,
            FOLD=buffer.fold,
            **constants(tile, width, buffer.keys.shape[2]),
            num_warps=tile.warps,
            **launch_options(qkvu),
        )
    return y, sums.sum(-1)
