"""Gradient clipping by global norm (arXiv 1211.5063), as a divisor that the optimizer applies to gradients."""

import torch
from torch import Tensor

EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_ and DeepSpeed


def clipping_divisor(norm: Tensor, limit: float) -> Tensor:
    """max(1, (norm + epsilon) / limit), fp32 [], on norm's device; NaN where norm is not finite.

    norm: global L2 norm of the gradients. limit: 0 means no clipping (divisor 1).

    A separate scaling pass over fp32 gradients would move 8 bytes an element; an optimizer kernel that divides
    gradients as it reads them moves none. The norm stays on the device: the optimizer skips its update where the
    divisor is not finite.
    """
    divisor = ((norm + EPSILON) / limit).clamp(min=1) if limit else torch.ones_like(norm)
    return torch.where(norm.isfinite(), divisor, torch.nan).float()
