"""RoPE in Triton: one program rotates a token's heads of q and of k, and forms their common angles once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gla.triton_features import cos_sin
from kernels.rope.angles import turn_fractions
from kernels.rows import as_rows

ELEMENTS, WARPS = 1024, 4  # elements of half a head, times heads, per program


@triton.jit
def rotate(x_pointer, y_pointer, at, half, cos, sin, mask):
    a = tl.load(x_pointer + at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_pointer + at + half, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_pointer + at, (a * cos - b * sin).to(y_pointer.dtype.element_ty), mask=mask)
    tl.store(y_pointer + at + half, (b * cos + a * sin).to(y_pointer.dtype.element_ty), mask=mask)


@triton.jit
def rope_kernel(
    q_pointer,  # [tokens, H d]; so k, and the results
    k_pointer,
    rotated_q_pointer,
    rotated_k_pointer,
    positions_pointer,  # [T] int64
    fractions_pointer,  # [d / 2] int64, see turn_fractions
    q_row,
    k_row,
    length,  # T
    heads,
    half,  # d / 2
    BACK: tl.constexpr,
    QUICK: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    token = tl.program_id(0) + tl.arange(0, 1)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    j = tl.arange(0, HALF)
    position = tl.load(positions_pointer + token % length)
    fraction = tl.load(fractions_pointer + j, mask=j < half, other=0)
    cos, sin = cos_sin(position, fraction, QUICK)  # [1, HALF]
    if BACK:
        sin = -sin
    at = head[:, None] * (2 * half) + j[None, :]
    mask = (head < heads)[:, None] & (j < half)[None, :]
    token = tl.program_id(0).to(tl.int64)
    out = token * heads * 2 * half
    rotate(q_pointer + token * q_row, rotated_q_pointer + out, at, half, cos, sin, mask)
    rotate(k_pointer + token * k_row, rotated_k_pointer + out, at, half, cos, sin, mask)


def rotate_heads(
    q: Tensor, k: Tensor, positions: Tensor, *, head_dim: int, base: float, back: bool
) -> tuple[Tensor, Tensor]:
    """q, k [B, T, H d] -> rotated, contiguous, in their type."""
    rotated = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    rows = [as_rows(x) for x in (q, k)]
    heads, half = q.shape[-1] // head_dim, head_dim // 2
    block = triton.next_power_of_2(half)
    at_once = min(max(ELEMENTS // block, 1), triton.next_power_of_2(heads))
    with torch.cuda.device_of(q):
        rope_kernel[(rows[0].shape[0], triton.cdiv(heads, at_once))](
            q_pointer=rows[0],
            k_pointer=rows[1],
            rotated_q_pointer=rotated[0],
            rotated_k_pointer=rotated[1],
            positions_pointer=positions.contiguous(),
            fractions_pointer=turn_fractions(head_dim, base, q.device),
            q_row=rows[0].stride(0),
            k_row=rows[1].stride(0),
            length=q.shape[-2],
            heads=heads,
            half=half,
            BACK=back,
            QUICK=q.dtype == torch.bfloat16,
            HEADS=at_once,
            HALF=block,
            num_warps=WARPS,
        )
    return rotated
