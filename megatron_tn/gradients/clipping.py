"""Clipping of gradients to a global norm (arXiv 1211.5063), as a number that the optimizer divides them by."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_ and DeepSpeed have it


def clipping_divisor(norm: Tensor, limit: float) -> Tensor:
    """max(1, (norm + epsilon) / limit), fp32 [], on norm's device; NaN where norm is not finite.

    norm: of all gradients over all ranks. limit: 0 means no limit, and a divisor of 1.

    A pass over fp32 gradients that scales them would move 8 bytes an element; an optimizer that divides as it reads
    them moves none. The host need not know the norm: a divisor that is not finite tells the optimizer to change
    nothing.
    """
    divisor = ((norm + EPSILON) / limit).clamp(min=1) if limit else torch.ones_like(norm)
    return torch.where(norm.isfinite(), divisor, torch.nan).float()
