"""One decoding step in one kernel: a program owns SLICE columns of one head's state.

It reads the columns, updates S <- exp(-r) S + k^T v, writes them and computes o = q S: 8 bytes of memory traffic per
element of the state; all other tensors are small. Every program computes the features of k and q itself, in fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.activations.triton_activations import ACTIVATIONS, activate
from kernels.dependent_launch import launch_options
from kernels.gla.inputs import PIECE, GlaInputs
from kernels.gla.triton_features import turn_of
from kernels.lightning.tiles import padded

SLICE, WARPS = PIECE, 4  # columns of the state: rows of 128 bytes


@triton.jit
def step_kernel(
    x_pointer,  # [B, 4 H d]: q | k | v | u
    theta_pointer,  # [H d], or None: no LRPE
    positions_pointer,  # [B] or [1], or None: 0
    decay_pointer,  # [H] fp32
    state_pointer,  # [B, H, K, d] fp32
    new_state_pointer,  # [B, H, K, d] fp32
    y_pointer,  # [B, H d]
    sums_pointer,  # [B, H, slices] fp32: parts of the sum of o^2
    x_row,
    positions_row,
    heads,
    width,  # d
    summed_width,  # K: d, or 2 d with LRPE
    slices,
    ACT: tl.constexpr,
    QUICK: tl.constexpr,
    GATE: tl.constexpr,
    SUMMED: tl.constexpr,
    SLICE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    piece = tl.program_id(0) % slices
    row_head = tl.program_id(0) // slices
    row = row_head // heads
    head = row_head % heads
    i = tl.arange(0, SUMMED)
    column = piece * SLICE + tl.arange(0, SLICE)
    held = i < summed_width
    wanted = column < width
    source = tl.where(i < width, i, i - width)  # LRPE features: cosine half, then sine half of the same elements

    x = x_pointer + row.to(tl.int64) * x_row + head * width
    part = heads * width
    q = activate(tl.load(x + source, mask=held, other=0.0).to(tl.float32), ACT, QUICK)
    k = activate(tl.load(x + part + source, mask=held, other=0.0).to(tl.float32), ACT, QUICK)
    if theta_pointer is not None:
        turn = turn_of(
            theta_pointer + head * width, positions_pointer, positions_row, row, i, source, held, QUICK, SUMMED
        )
        q *= turn
        k *= turn
    # With "1+elu", act(0) = 1: padding must be zeroed after the activation.
    q = tl.where(held, q, 0.0)
    k = tl.where(held, k, 0.0)
    v = tl.load(x + 2 * part + column, mask=wanted, other=0.0).to(tl.float32)

    at = row_head.to(tl.int64) * summed_width * width + i[:, None] * width + column[None, :]
    mask = held[:, None] & wanted[None, :]
    state = tl.load(state_pointer + at, mask=mask, other=0.0)
    state = state * tl.exp(-tl.load(decay_pointer + head)) + k[:, None] * v[None, :]
    tl.store(new_state_pointer + at, state, mask=mask)
    o = tl.sum(state * q[:, None], 0)
    tl.store(sums_pointer + tl.program_id(0), tl.sum(o * o, 0))
    if GATE:
        o *= tl.load(x + 3 * part + column, mask=wanted, other=0.0).to(tl.float32)
    y_at = y_pointer + row_head.to(tl.int64) * width + column
    tl.store(y_at, o.to(y_pointer.dtype.element_ty), mask=wanted)


def step(inputs: GlaInputs, new_state: Tensor) -> tuple[Tensor, Tensor]:
    """y [B, 1, H d] and the sums of o^2 over SLICE columns of a head each, [B, P]; see step.py.

    The state is inputs.initial_state. The next state is written to new_state [B, H, K, d], fp32 and contiguous, which
    may be the same tensor.
    """
    qkvu, theta, positions = inputs.qkvu, inputs.theta, inputs.positions
    batch, _, fused = qkvu.shape
    state = inputs.initial_state.contiguous()
    _, heads, summed, width = state.shape
    slices = triton.cdiv(width, SLICE)
    qkvu = qkvu if qkvu.stride(-1) == 1 else qkvu.contiguous()
    y = torch.empty(batch, 1, fused // 4, dtype=qkvu.dtype, device=qkvu.device)
    sums = torch.empty(batch, heads * slices, dtype=torch.float32, device=qkvu.device)
    with torch.cuda.device_of(qkvu):
        step_kernel[(batch * heads * slices,)](
            x_pointer=qkvu,
            theta_pointer=None if theta is None else theta.contiguous(),
            positions_pointer=positions,
            decay_pointer=inputs.decay.to(torch.float32).contiguous(),
            state_pointer=state,
            new_state_pointer=new_state,
            y_pointer=y,
            sums_pointer=sums,
            x_row=qkvu.stride(0),
            positions_row=0 if positions is None or positions.dim() == 1 else positions.stride(0),
            heads=heads,
            width=width,
            summed_width=summed,
            slices=slices,
            ACT=ACTIVATIONS[inputs.act],
            QUICK=qkvu.dtype == torch.bfloat16,
            GATE=inputs.gate,
            SUMMED=padded(summed),
            SLICE=SLICE,
            num_warps=WARPS,
            **launch_options(qkvu),
        )
    return y, sums
