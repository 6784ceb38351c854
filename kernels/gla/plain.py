"""Gated linear attention in plain PyTorch: the feature map, lightning attention's chunked form, and the gate.

Inputs of any floating type, arithmetic in fp32 (fp64 for fp64). With LRPE gradients are computed in fp64: dtheta is a
sum of terms proportional to the position, which cancel.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.activations.plain import ACTIVATIONS
from kernels.gla.inputs import GlaInputs, Saved, parts
from kernels.lightning import chunked
from kernels.numerics import accumulation_dtype


class _Turn(NamedTuple):
    """LRPE's cos(theta t) and sin(theta t), [T, H, d] or [B, T, H, d]; positions: t, [T] or [B, T]."""

    cos: Tensor
    sin: Tensor
    positions: Tensor

    @classmethod
    def of(cls, inputs: GlaInputs, dtype: torch.dtype) -> "_Turn | None":
        """LRPE's factors at the inputs' positions; None without LRPE."""
        if inputs.theta is None:
            return None
        positions = inputs.positions
        if positions is None:
            positions = torch.arange(inputs.total, device=inputs.theta.device)
        angle = inputs.theta[:, 0].to(torch.float64) * positions[..., None, None]
        # Reduced modulo 2 pi in fp64: in fp32 the product with a position of a million would be off by 0.03.
        angle = (angle - (angle / math.tau).round() * math.tau).to(dtype)
        return cls(angle.cos(), angle.sin(), positions)


def forward(inputs: GlaInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (o itself without a gate) and o, [B, T, H, d] in qkvu's type, the sum of o^2 [B, T] and the final state."""
    q, k, v, u = inputs.parts
    dtype = accumulation_dtype(v.dtype)
    turn = _Turn.of(inputs, dtype)
    q, k = (_features(x, inputs.act, turn, dtype) for x in (q, k))
    o, state = chunked.forward(inputs.attention(q, k, v))
    square_sum = torch.linalg.vector_norm(o.flatten(2), dim=-1, dtype=dtype).square()
    return o * u if inputs.gate else o, o, square_sum, state


def features(inputs: GlaInputs, x: Tensor) -> Tensor:
    """The features [B, T, H, K] of x, q or k of `inputs`, [B, T, H, d], in the accumulation type."""
    dtype = accumulation_dtype(x.dtype)
    return _features(x, inputs.act, _Turn.of(inputs, dtype), dtype)


def final_state(inputs: GlaInputs) -> Tensor:
    """The final state alone, [B or documents, H, K, d]."""
    _, k, v, _ = inputs.parts
    dtype = accumulation_dtype(v.dtype)
    k = _features(k, inputs.act, _Turn.of(inputs, dtype), dtype)
    return chunked.forward(inputs.attention(k, k, v))[1]


def backward(
    inputs: GlaInputs,
    saved: Saved,
    *,
    dy: Tensor | None,
    dsquare_sum: Tensor | None,
    dstate: Tensor | None,
    exchange: Callable[[Tensor], Callable[[], Tensor]] | None,
    dqkvu: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Write dqkvu [B, T, 4 H d]; return the gradients of the initial state and of theta [H, 1, d] (None without LRPE).
    The other arguments as in `kernels.gla.op.gradients`."""
    q, k, v, u = inputs.parts
    dq, dk, dv, du = parts(dqkvu, inputs.heads)
    dtype = accumulation_dtype(v.dtype) if inputs.theta is None else torch.float64
    o = saved.o.to(dtype)
    do = torch.zeros_like(o)
    if dsquare_sum is not None:
        do += 2 * dsquare_sum[..., None, None] * o
    du.zero_()
    if dy is not None:
        dy = dy.view(v.shape)
        do += dy * u.to(dtype) if inputs.gate else dy
        if inputs.gate:
            du.copy_(dy * o)
    turn = _Turn.of(inputs, dtype)
    fq, fk = (_features(x, inputs.act, turn, dtype) for x in (q, k))
    if exchange is not None:
        own = chunked.initial_gradient(fq, do=do, decay=inputs.decay, cu_seqlens=inputs.cu_seqlens)
        dstate = exchange(own.to(accumulation_dtype(v.dtype)))()
    found = chunked.backward(inputs.attention(fq, fk, v.to(dtype)), do=do, dstate=dstate)
    angles = []
    for target, df, x in ((dq, found[0], q), (dk, found[1], k)):
        dx, dangle = _feature_gradients(df, x, inputs.act, turn)
        target.copy_(dx)
        angles.append(dangle)
    dv.copy_(found[2])
    if turn is None:
        return found[3], None
    t = turn.positions.to(torch.float64)[..., None, None]
    return found[3], ((angles[0] + angles[1]) * t).sum((0, 1))[:, None]


def _features(x: Tensor, act: str, turn: _Turn | None, dtype: torch.dtype) -> Tensor:
    """The features of q or k in `dtype`: x [B, T, H, d] -> [B, T, H, d], or [B, T, H, 2 d] with LRPE."""
    x = ACTIVATIONS[act].function(x.to(dtype))
    return x if turn is None else torch.cat((x * turn.cos, x * turn.sin), dim=-1)


def _feature_gradients(df: Tensor, x: Tensor, act: str, turn: _Turn | None) -> tuple[Tensor, Tensor | None]:
    """df, the gradient of the features -> dx and, with LRPE, the gradient of the angles theta t, [B, T, H, d]."""
    x, dangle = x.to(df.dtype), None
    if turn is not None:
        dcos, dsin = df.chunk(2, dim=-1)
        dangle = (dsin * turn.cos - dcos * turn.sin) * ACTIVATIONS[act].function(x)
        df = dcos * turn.cos + dsin * turn.sin
    return df * ACTIVATIONS[act].derivative(x), dangle
