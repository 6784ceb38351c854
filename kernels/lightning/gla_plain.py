"""Gated linear attention in plain PyTorch: the feature map, lightning attention's chunked form, and the gate.

With LRPE the gradients are formed in fp64: theta's is a sum of terms of the size of t that cancel. Otherwise any
floating type in, fp32 (fp64) inside.
"""

import math

import torch
from torch import Tensor

from kernels.lightning import chunked
from kernels.lightning.activations import ACTIVATIONS
from kernels.lightning.fused import Exchange
from kernels.numerics import accumulation_dtype


def features(x: Tensor, act: str, table: tuple[Tensor, Tensor] | None, dtype: torch.dtype) -> Tensor:
    """The features of q or k: x [B, T, H, d] -> [B, T, H, d], or 2d with LRPE (table: cos and sin), in `dtype`."""
    x = ACTIVATIONS[act].function(x.to(dtype))
    return x if table is None else torch.cat((x * table[0], x * table[1]), dim=-1)


def feature_gradients(
    df: Tensor, x: Tensor, act: str, table: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor | None]:
    """From the gradient of the features those of x and, with LRPE, of the angles theta t [B, T, H, d]."""
    x, dangle = x.to(df.dtype), None
    if table is not None:
        (cos, sin), (dcos, dsin) = table, df.chunk(2, dim=-1)
        dangle = (dsin * cos - dcos * sin) * ACTIVATIONS[act].function(x)
        df = dcos * cos + dsin * sin
    return df * ACTIVATIONS[act].derivative(x), dangle


def _table(
    theta: Tensor | None, positions: Tensor | None, total: int, dtype: torch.dtype
) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
    """Positions [T] or [B, T], 0, 1, ... by default, and cos and sin of theta t, [T, H, d] or [B, T, H, d]."""
    if theta is None:
        return None, None
    if positions is None:
        positions = torch.arange(total, device=theta.device)
    angle = theta[:, 0].to(torch.float64) * positions[..., None, None]
    # Reduced in fp64: in fp32 the product with a long position would be off by a good part of a turn.
    angle = (angle - (angle / math.tau).round() * math.tau).to(dtype)
    return positions, (angle.cos(), angle.sin())


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    decay: Tensor,
    theta: Tensor | None,
    act: str,
    gated: bool,
    positions: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o and y = o u [B, T, H, d] in v's type, the sum of o^2 [B, T] and the final state; without a gate y is o."""
    dtype = accumulation_dtype(v.dtype)
    _, table = _table(theta, positions, q.shape[1], dtype)
    fq, fk = (features(x, act, table, dtype) for x in (q, k))
    o, state = chunked.forward(fq, fk, v, decay, initial_state, cu_seqlens)
    square_sum = torch.linalg.vector_norm(o.flatten(2), dim=-1, dtype=dtype).square()
    return o, o * u if gated else o, square_sum, state


def backward(
    dy: Tensor | None,
    dsquare_sum: Tensor | None,
    dstate: Tensor | Exchange | None,
    o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    decay: Tensor,
    theta: Tensor | None,
    act: str,
    gated: bool,
    positions: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    out: tuple[Tensor, Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor | None]:
    """Writes the gradients of q, k, v, u to `out`; returns those of the initial state and of theta (None without)."""
    dtype = accumulation_dtype(v.dtype) if theta is None else torch.float64
    wide = o.to(dtype)
    do = torch.zeros_like(wide)
    if dsquare_sum is not None:
        do += 2 * dsquare_sum[..., None, None] * wide
    out[3].zero_()
    if dy is not None:
        do += dy * u.to(dtype) if gated else dy
        if gated:
            out[3].copy_(dy * wide)
    positions, table = _table(theta, positions, q.shape[1], dtype)
    fq, fk = (features(x, act, table, dtype) for x in (q, k))
    if callable(dstate):
        dstate = dstate(chunked.initial_gradient(fq, do, decay, cu_seqlens).to(accumulation_dtype(v.dtype)))()
    dfq, dfk, dv, dinitial = chunked.backward(do, dstate, fq, fk, v.to(dtype), decay, initial_state, cu_seqlens)
    dq, dangle_q = feature_gradients(dfq, q, act, table)
    dk, dangle_k = feature_gradients(dfk, k, act, table)
    for target, gradient in zip(out, (dq, dk, dv), strict=False):
        target.copy_(gradient)
    if theta is None:
        return dinitial, None
    t = positions.to(torch.float64)[..., None, None]
    return dinitial, ((dangle_q + dangle_k) * t).sum((0, 1))[:, None]
