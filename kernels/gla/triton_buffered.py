"""One buffered decoding step in one kernel: a program owns SLICE columns of one head's state.

It reads the columns and the head's buffer, and computes o; at the last slot it also folds the buffer into the columns
and writes them. Memory traffic per element of the state: 4 (1 + 1/W) bytes, and a buffer that is W / d of the state's
elements, in the type of qkvu.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.dependent_launch import launch_options
from kernels.gla.inputs import GlaInputs
from kernels.gla.step_buffer import StepBuffer
from kernels.gla.triton_features import ACTIVATIONS, activate, turn_of
from kernels.lightning.tiles import padded

ELEMENTS, WARPS = 4096, 4  # of the state that a program holds: 32 registers a thread


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
    sums_pointer,  # [B, H, slices] fp32: parts of the sum of o^2
    x_row,
    positions_row,
    heads,
    width,  # d
    summed_width,  # K: d, or 2 d with LRPE
    slices,
    buffered,  # W
    ACT: tl.constexpr,
    QUICK: tl.constexpr,
    GATE: tl.constexpr,
    SUMMED: tl.constexpr,
    SLICE: tl.constexpr,
    SLOTS: tl.constexpr,  # W, padded
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    piece = tl.program_id(0) % slices
    row_head = (tl.program_id(0) // slices).to(tl.int64)
    row = row_head // heads
    head = row_head % heads
    i = tl.arange(0, SUMMED)
    j = tl.arange(0, SLOTS)
    column = piece * SLICE + tl.arange(0, SLICE)
    held = i < summed_width
    wanted = column < width
    source = tl.where(i < width, i, i - width)  # LRPE features: cosine half, then sine half of the same elements

    # These loads come first, and none depends on another, so that their latencies overlap.
    at = state_pointer + row_head * summed_width * width + i[:, None] * width + column[None, :]
    mask = held[:, None] & wanted[None, :]
    state = tl.load(at, mask=mask, other=0.0)
    keys_at = keys_pointer + row_head * buffered * summed_width
    values_at = values_pointer + row_head * buffered * width
    there = j < buffered
    keys = tl.load(keys_at + j[:, None] * summed_width + i[None, :], mask=there[:, None] & held[None, :], other=0.0)
    values = tl.load(values_at + j[:, None] * width + column[None, :], mask=there[:, None] & wanted[None, :], other=0.0)
    x = x_pointer + row * x_row + head * width
    part = heads * width
    q = tl.load(x + source, mask=held, other=0.0).to(tl.float32)
    k = tl.load(x + part + source, mask=held, other=0.0).to(tl.float32)
    v = tl.load(x + 2 * part + column, mask=wanted, other=0.0)
    if GATE:
        u = tl.load(x + 3 * part + column, mask=wanted, other=0.0).to(tl.float32)
    slot = tl.load(slot_pointer).to(tl.int32)
    start = tl.load(start_pointer + row).to(tl.int32)
    rate = tl.load(decay_pointer + head)

    q = activate(q, ACT, QUICK)
    k = activate(k, ACT, QUICK)
    if theta_pointer is not None:
        turn = turn_of(theta_pointer + head * width, positions_pointer, positions_row, row, source, held, QUICK, SUMMED)
        q *= turn
        k *= turn
    q = tl.where(held, q, 0.0)
    # What the fold will read: the key as it is stored.
    k = tl.where(held, k, 0.0).to(keys_pointer.dtype.element_ty)

    # The current token takes its slot; the slots not in use may hold anything, NaN too.
    earlier = (j >= start) & (j < slot)
    current = j == slot
    keys = tl.where(earlier[:, None], keys, tl.where(current[:, None], k[None, :], 0.0))
    values = tl.where(earlier[:, None], values, tl.where(current[:, None], v[None, :], 0.0))
    if piece == 0:
        tl.store(keys_at + slot * summed_width + i, k, mask=held)
    tl.store(values_at + slot * width + column, v, mask=wanted)

    used = earlier | current
    before = tl.exp(-rate * (slot + 1 - start).to(tl.float32))
    age = tl.where(used, tl.exp(-rate * tl.where(used, slot - j, 0).to(tl.float32)), 0.0)
    scores = tl.sum(keys.to(tl.float32) * q[None, :], 1) * age
    o = tl.sum(state * (before * q)[:, None], 0) + tl.sum(values.to(tl.float32) * scores[:, None], 0)
    if slot == buffered - 1:
        weighted = tl.trans(keys.to(tl.float32) * age[:, None])
        tl.store(at, tl.dot(weighted, values.to(tl.float32), state * before, input_precision="tf32x3"), mask=mask)
    tl.store(sums_pointer + tl.program_id(0), tl.sum(o * o, 0))
    if GATE:
        o *= u
    tl.store(y_pointer + row_head * width + column, o.to(y_pointer.dtype.element_ty), mask=wanted)


def slice_columns(summed: int, width: int) -> int:
    """SLICE for states [K, d] = [summed, width]."""
    return min(ELEMENTS // padded(summed), padded(width))


def step(inputs: GlaInputs, buffer: StepBuffer) -> tuple[Tensor, Tensor]:
    """See `gla_step_buffered_` in buffered.py."""
    qkvu, theta, positions = inputs.qkvu, inputs.theta, inputs.positions
    batch, _, fused = qkvu.shape
    _, heads, summed, width = buffer.state.shape
    slots = buffer.keys.shape[2]
    piece = slice_columns(summed, width)
    slices = triton.cdiv(width, piece)
    y = torch.empty(batch, 1, fused // 4, dtype=qkvu.dtype, device=qkvu.device)
    sums = torch.empty(batch, 1, heads * slices, dtype=torch.float32, device=qkvu.device)
    with torch.cuda.device_of(qkvu):
        buffered_step_kernel[(batch * heads * slices,)](
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
            slices=slices,
            buffered=slots,
            ACT=ACTIVATIONS[inputs.act],
            QUICK=qkvu.dtype == torch.bfloat16,
            GATE=inputs.gate,
            SUMMED=padded(summed),
            SLICE=piece,
            SLOTS=padded(slots),
            num_warps=WARPS,
            **launch_options(qkvu),
        )
    return y, sums.sum(-1)
