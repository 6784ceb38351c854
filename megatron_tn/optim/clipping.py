"""Clipping gradients to a global norm (arXiv 1211.5063), within the update where its kernel can."""

from __future__ import annotations

import torch

EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_ and DeepSpeed have it


def clip_gradients(optimizer: torch.optim.Optimizer, norm: float, limit: float) -> None:
    """Between the gradients' last sum and `optimizer.step()`: has that step take them times limit / norm, if they are
    longer than `limit`; 0 is no limit.

    norm: of all gradients, over all ranks. A pass of its own over fp32 gradients moves 8 bytes a parameter. AdamW's
    kernel divides by a number on its way (which gradient scalers use), and moves 4, to leave what it divided behind.
    """
    divisor = (norm + EPSILON) / limit if limit and norm > limit else None
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.grad_scale = None if divisor is None else torch.full((), divisor, device=parameters[0].device)
    elif divisor is not None:  # apex's
        torch._foreach_mul_([parameter.grad for parameter in parameters if parameter.grad is not None], 1 / divisor)
