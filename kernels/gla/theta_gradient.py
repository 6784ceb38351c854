"""dtheta in three parts. `near` and `far` have no terms proportional to the position; `ends` is computed in fp64.

LRPE turns q at position t by theta t and k at s by theta s. With a_t and b_s the gradients of these angles, [H, d],

    dtheta = sum over t of t a_t + sum over s of s b_s = sum over pairs s <= t of (t - s) w_ts,

where a_t = sum over s of w_ts and b_s = -sum over t of w_ts. In the first form, large terms t a_t and s b_s cancel, and
at large positions an fp32 result would be rounding error. So a sequence is cut into stretches of THETA_STRETCH
positions:

    near   t and s relative to the middle of their stretch: feature_gradients_kernel (triton_features.py)
    far    for each boundary between stretches, THETA_STRETCH times the sum of w_ts over pairs with s before and t after
           the boundary: CROSSING (kernels/lightning/triton_scan.py)
    ends   pairs of a position with the initial state: the sum of their w times the position of the first stretch's
           middle; with the final state: minus their sum times the position of the last stretch's: `end_terms`, here
"""

import torch
from torch import Tensor

from kernels.gla.inputs import GlaInputs
from kernels.lightning import tiles


def middle_of_first(length: int | Tensor) -> float | Tensor:
    """Index of the middle of the first stretch, in a sequence of `length` positions."""
    if isinstance(length, Tensor):
        return (length.clamp(min=1, max=tiles.THETA_STRETCH) - 1) / 2
    return (min(length, tiles.THETA_STRETCH) - 1) / 2


def distances_from_middle(cu_seqlens: Tensor, total: int) -> Tensor:
    """[total] fp32: every token's index in its stretch, minus `middle_of_first` of its document."""
    token = torch.arange(total, dtype=torch.int32, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens, token, right=True) - 1
    place = (token - cu_seqlens[document]) % tiles.THETA_STRETCH
    return (place - middle_of_first(cu_seqlens.diff())[document]).to(torch.float32)


def end_terms(inputs: GlaInputs, *, dinitial: Tensor, dstate: Tensor | None, state: Tensor | None) -> Tensor | float:
    """[H, d] fp64: the part of dtheta from the initial and the final state.

    dinitial, dstate, state: [B or documents, H, 2 d, d]; dstate None for zero.
    """
    terms = 0.0
    if inputs.initial_state is not None:
        terms = _angle_gradient(inputs.initial_state, dinitial, weight=_middle_of_first_stretch(inputs))
    if dstate is not None:
        terms = terms - _angle_gradient(state, dstate, weight=_middle_of_last_stretch(inputs))
    return terms


def _angle_gradient(state: Tensor, gradient: Tensor, *, weight: Tensor) -> Tensor:
    """[H, d] fp64: minus the gradient of the angle that turns the states, summed over sequences with `weight` [n]."""
    (cos, sin), (dcos, dsin) = (x.to(torch.float64).chunk(2, dim=2) for x in (state, gradient))
    return torch.einsum("nhk,n->hk", (dcos * sin - dsin * cos).sum(-1), weight)


def _middle_of_first_stretch(inputs: GlaInputs) -> Tensor:
    """Position of the middle of every sequence's first stretch, [sequences] fp64."""
    total, bounds = inputs.total, inputs.cu_seqlens
    count = inputs.qkvu.shape[0] if bounds is None else bounds.shape[0] - 1
    begin = torch.zeros(count, dtype=torch.float64, device=inputs.qkvu.device)
    if inputs.positions is not None:
        if bounds is None:
            begin += inputs.positions[..., 0]
        else:
            begin += inputs.positions.flatten()[bounds[:-1].clamp(max=total - 1).long()]
    return begin + (middle_of_first(total) if bounds is None else middle_of_first(bounds.diff()))


def _middle_of_last_stretch(inputs: GlaInputs) -> Tensor:
    """[sequences] fp64: the middle of the first stretch, plus THETA_STRETCH times the number of stretches after it."""
    first, bounds = _middle_of_first_stretch(inputs), inputs.cu_seqlens
    length = torch.full_like(first, inputs.total) if bounds is None else bounds.diff().to(first.dtype)
    return first + ((length - 1).clamp(min=0) // tiles.THETA_STRETCH) * tiles.THETA_STRETCH
