"""Absolute positions: the sinusoids that are added to the embeddings (model.absolute_positions, an ablation)."""

import math

import torch
from torch import Tensor

from megatron_tn.model.layout import TokenLayout


def sinusoids(layout: TokenLayout, width: int) -> Tensor:
    """sin(w_j t) in column 2j and cos(w_j t) in column 2j + 1, w_j = 10000^(-2j/D) (arXiv 1706.03762, section 3.5).

    Returns fp64 [n, D], or [B, n, D] where rows have positions of their own; t is a token's position in its document.
    With layout.token_slices, the rows of this rank's slice [S, D].
    """
    positions = layout.positions
    if layout.token_slices is not None:
        positions = layout.token_slices.take(positions)
    column = torch.arange(width, device=positions.device)
    frequency = 10000.0 ** (-2 * (column // 2).double() / width)
    # fp64: in fp32 the product is off by 0.03 rad at a position of a million. cos(a) = sin(a + pi / 2).
    return torch.sin(positions.double()[..., None] * frequency + (column % 2).double() * (math.pi / 2))
