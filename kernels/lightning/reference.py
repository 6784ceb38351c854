"""The definition of lightning attention: the recurrence of arXiv 2307.14995 (section 3.4, "robust inference").

One position after the other, in the inputs' type (give it fp64), differentiable by autograd.
"""

import itertools

import torch
from torch import Tensor


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = exp(-r) S_{t-1} + k_t^T v_t and o_t = q_t S_t, one position after the other.

    Shapes and meaning are those of `kernels.lightning_attention`; the state is always returned, in the inputs' type.
    """
    if cu_seqlens is None:
        return _one_batch(q, k, v, decay, initial_state)
    bounds = cu_seqlens.tolist()
    outputs, states = [], []
    for document, (start, stop) in enumerate(itertools.pairwise(bounds)):
        begin = None if initial_state is None else initial_state[document : document + 1]
        piece = slice(start, stop)
        o, state = _one_batch(q[:, piece], k[:, piece], v[:, piece], decay, begin)
        outputs.append(o)
        states.append(state)
    return torch.cat(outputs, dim=1), torch.cat(states)


def _one_batch(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    if initial_state is None:
        state = q.new_zeros(batch, heads, k.shape[-1], v.shape[-1])
    else:
        state = initial_state.to(q.dtype)
    fade = torch.exp(-decay.to(q.dtype))[:, None, None]
    outputs = [v.new_zeros(batch, 0, heads, v.shape[-1])]
    for t in range(length):
        state = fade * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((q[:, t, :, None, :] @ state).transpose(1, 2))
    return torch.cat(outputs, dim=1), state
