"""Lightning attention in plain PyTorch: products within chunks, a carried state between them (arXiv 2401.04658).

With a chunk's positions i, j, its length L and the state S before it,

    o_i = sum over j <= i of exp(-r (i - j)) (q_i . k_j) v_j  +  exp(-r (i + 1)) q_i S
    S  <- exp(-r L) S + sum over j of exp(-r (L - 1 - j)) k_j^T v_j

Backward, the gradient G of the state is carried from the last chunk to the first, with the exponents of the two
equations exchanged. Every exponent is <= 0. Products are batched over rows, heads and chunks; only the recurrences of S
and G loop over chunks. Inputs of any floating type; arithmetic in fp32 (fp64 for fp64).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.lightning.chunk_layout import ChunkLayout, packed_documents, whole_rows
from kernels.lightning.inputs import AttentionInputs
from kernels.numerics import accumulation_dtype, in_own_types


@dataclass(frozen=True)
class _Decay:
    """Powers of exp(-r) for one call; all broadcast to [chunks, B, H, size, width]."""

    within: Tensor  # [H, size, size]: exp(-r (i - j)) for j <= i, else 0
    from_start: Tensor  # [H, size, 1]: exp(-r (i + 1)), the weight at i of the state before the chunk
    to_end: Tensor  # [chunks, 1, H, size, 1]: exp(-r (L - 1 - j)), the weight of j in the state after the chunk
    across: Tensor  # [chunks, H, 1, 1]: exp(-r L), the weight of the state before the chunk in the state after it

    @classmethod
    def of(cls, decay: Tensor, layout: ChunkLayout, dtype: torch.dtype) -> "_Decay":
        rate = decay.to(dtype)
        i = torch.arange(layout.size, device=decay.device)
        distance = (i[:, None] - i).clamp(min=0)
        within = torch.exp(-rate[:, None, None] * distance).tril_()
        from_start = torch.exp(-rate[:, None] * (i + 1))
        remaining = (layout.lengths[:, None] - 1 - i).clamp(min=0)
        to_end = torch.exp(-rate[:, None] * remaining[:, None, :])
        across = torch.exp(-rate * layout.lengths[:, None])
        return cls(within, from_start[..., None], to_end[:, None, :, :, None], across[..., None, None])


@in_own_types
def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """o in v's type and the final state in the accumulation type; shapes as in `kernels.lightning_attention`."""
    q, k, v = inputs[:3]
    dtype = accumulation_dtype(q.dtype)
    layout = _layout(q, v, inputs.cu_seqlens)
    powers = _Decay.of(inputs.decay, layout, dtype)
    qc, kc, vc = (layout.split(x, dtype) for x in (q, k, v))

    o = (qc @ kc.mT).mul_(powers.within) @ vc
    states = _states(kc.mul_(powers.to_end), vc, powers, layout, inputs.initial_state)
    _add_product(o, qc.mul_(powers.from_start), _at(states, layout, 0))
    return layout.join(o, v.dtype), _documents(states[layout.last], inputs.cu_seqlens)


@in_own_types
def backward(inputs: AttentionInputs, *, do: Tensor, dstate: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, in their types, and of the initial state, in the accumulation type.

    do: [B, T, H, V]. dstate: the gradient of the final state, None for zero.
    """
    q, k, v = inputs[:3]
    dtype = accumulation_dtype(q.dtype)
    layout = _layout(q, v, inputs.cu_seqlens)
    powers = _Decay.of(inputs.decay, layout, dtype)
    qc, kc, vc, doc = (layout.split(x, dtype) for x in (q, k, v, do))

    scores = (qc @ kc.mT).mul_(powers.within)
    dv = scores.mT @ doc
    dscores = torch.matmul(doc, vc.mT, out=scores).mul_(powers.within)
    dq = dscores @ kc
    dk = dscores.mT @ qc

    kc.mul_(powers.to_end)
    states = _states(kc, vc, powers, layout, inputs.initial_state)
    doc.mul_(powers.from_start)
    _add_product(dq, doc, _at(states, layout, 0).mT)

    dstates = _state_gradients(qc, doc, powers, layout, dstate, out=states)
    after = _at(dstates, layout, 1)
    _add_product(dv, kc, after)
    _add_product(dk, vc.mul_(powers.to_end), after.mT)
    gradients = (layout.join(x, like.dtype) for x, like in ((dq, q), (dk, k), (dv, v)))
    return (*gradients, _documents(dstates[layout.first], inputs.cu_seqlens))


@in_own_types
def initial_gradient(q: Tensor, *, do: Tensor, decay: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Only the gradient of the initial state, with a final-state gradient of zero; shaped like the state."""
    dtype = accumulation_dtype(q.dtype)
    layout = _layout(q, do, cu_seqlens)
    powers = _Decay.of(decay, layout, dtype)
    qc, doc = (layout.split(x, dtype) for x in (q, do))
    states = qc.new_empty(layout.slots, *qc.shape[1:3], q.shape[-1], do.shape[-1])
    _state_gradients(qc, doc.mul_(powers.from_start), powers, layout, None, out=states)
    return _documents(states[layout.first], cu_seqlens)


def _layout(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> ChunkLayout:
    total = q.shape[1]
    # Chunks long enough that the states, K x V per chunk, have no more elements than the inputs.
    size = min(64 if max(q.shape[-1], v.shape[-1]) <= 64 else 128, total)
    if cu_seqlens is None:
        return whole_rows(total, size, q.device)
    return packed_documents(cu_seqlens, total, size)


def _states(k: Tensor, v: Tensor, powers: _Decay, layout: ChunkLayout, initial_state: Tensor | None) -> Tensor:
    """The state in every slot, [slots, B, H, K, V]. k: already multiplied by `to_end`."""
    _, batch, heads, _, width = k.shape
    states = k.new_empty(layout.slots, batch, heads, width, v.shape[-1])
    _fill(states, layout.first, initial_state)
    _write_products(k.mT, v, states, layout, 1)
    for chunk, slot in enumerate(layout.before):
        states[slot + 1].addcmul_(powers.across[chunk], states[slot])
    return states


def _state_gradients(
    q: Tensor, do: Tensor, powers: _Decay, layout: ChunkLayout, dstate: Tensor | None, out: Tensor
) -> Tensor:
    """The gradient of the state in every slot, [slots, B, H, K, V]. do: already multiplied by `from_start`."""
    _fill(out, layout.last, dstate)
    _write_products(q.mT, do, out, layout, 0)
    for chunk in reversed(range(layout.chunks)):
        slot = layout.before[chunk]
        out[slot].addcmul_(powers.across[chunk], out[slot + 1])
    return out


def _fill(states: Tensor, slots: list[int], given: Tensor | None) -> None:
    """Set `slots` of states to `given`: [B, H, K, V], [documents, H, K, V] for packed documents, or None for 0."""
    states[slots] = 0 if given is None else given.reshape(len(slots), *states.shape[1:]).to(states.dtype)


def _write_products(a: Tensor, b: Tensor, states: Tensor, layout: ChunkLayout, shift: int) -> None:
    """Set the state before (shift 0) or after (shift 1) every chunk to a @ b; without a copy for consecutive slots."""
    if layout.source is None:
        torch.matmul(a, b, out=states[shift : shift + layout.chunks])
    else:
        states[[slot + shift for slot in layout.before]] = a @ b


def _at(states: Tensor, layout: ChunkLayout, shift: int) -> Tensor:
    """The states before (shift 0) or after (shift 1) every chunk, [chunks, B, H, K, V]."""
    if layout.source is None:
        return states[shift : shift + layout.chunks]
    return states[[slot + shift for slot in layout.before]]


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b over all leading dimensions, without a temporary of out's size."""
    out.flatten(0, 2).baddbmm_(a.flatten(0, 2), b.flatten(0, 2))


def _documents(states: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[documents, B, H, K, V] -> [B or documents, H, K, V]: B is 1 for a packed row, `documents` for other rows."""
    return states.squeeze(0) if cu_seqlens is None else states.squeeze(1)
