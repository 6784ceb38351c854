"""The definition of gated linear attention, differentiable by autograd, in the inputs' type: give it fp64.

It uses the recurrence of kernels/lightning/reference.py and shares no code with the implementations.
"""

import torch
from torch import Tensor

from kernels.activations.reference import ACTIVATIONS
from kernels.lightning.reference import recurrence


def gla(
    qkvu: Tensor,
    decay: Tensor,
    theta: Tensor | None,
    *,
    act: str,
    gate: bool = True,
    positions: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, T, H d], the sum of o^2 [B, T] and the final state; arguments as in `kernels.gla`.

    positions: required with theta.
    """
    q, k, v, u = qkvu.unflatten(-1, (4, decay.shape[0], -1)).unbind(2)
    q, k = ACTIVATIONS[act](q), ACTIVATIONS[act](k)
    if theta is not None:
        q, k = lrpe(q, theta, positions), lrpe(k, theta, positions)
    o, state = recurrence(q, k, v, decay, initial_state=initial_state, cu_seqlens=cu_seqlens)
    y = o * u if gate else o
    return y.flatten(2), o.square().sum((-1, -2)), state


def lrpe(x: Tensor, theta: Tensor, positions: Tensor) -> Tensor:
    """[x cos(theta t), x sin(theta t)] (arXiv 2307.14995, equation 4): x [B, T, H, d] -> [B, T, H, 2 d].

    theta: [H, 1, d]. positions: the integers t, [T] or [B, T].
    """
    angle = theta[:, 0] * positions[..., None, None].to(theta.dtype)
    return torch.cat((x * torch.cos(angle), x * torch.sin(angle)), dim=-1)
