"""Clipping gradients to a global norm (arXiv 1211.5063), within the update where its kernel can."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_tn.optim.adamw import FusedAdamW
from megatron_tn.parallel.host_copy import HostCopy

EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_ and DeepSpeed have it


def clipped_step(optimizer: torch.optim.Optimizer, norm: Tensor, limit: float) -> float:
    """A step by the gradients times limit / norm, if they are longer than `limit`; 0 is no limit. Returns the norm.
    Where it is not finite nothing changes.

    norm: of all gradients, over all ranks, a scalar on their device. Whoever can does not wait for it: the host queues
    the update behind it, and has the norm when the device does.
    """
    if isinstance(optimizer, FusedAdamW):
        optimizer.divisor = _divisor(norm, limit)
        on_host = HostCopy(norm)  # queued before the update, so that reading it does not wait for that
        optimizer.step()
        found = on_host.read().item()
        if not found < float("inf"):
            optimizer.take_back()
        return found
    found = norm.item()
    if found < float("inf"):
        clip_gradients(optimizer, norm, limit)
        optimizer.step()
    return found


def clip_gradients(optimizer: torch.optim.Optimizer, norm: Tensor, limit: float) -> None:
    """Between the gradients' last sum and `optimizer.step()`: has that step take them times limit / norm, if they are
    longer than `limit`; 0 is no limit. norm: as of `clipped_step`, finite.

    A pass of its own over fp32 gradients moves 8 bytes a parameter. AdamW's kernels divide by a number on their way:
    ours for nothing, torch's, which leaves behind what it divided, for 4.
    """
    divisor = _divisor(norm, limit)
    if isinstance(optimizer, FusedAdamW):
        optimizer.divisor = divisor
    elif isinstance(optimizer, torch.optim.AdamW):
        optimizer.grad_scale = divisor if limit and norm > limit else None
    elif limit and norm > limit:  # apex's
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        torch._foreach_mul_([parameter.grad for parameter in parameters if parameter.grad is not None], 1 / divisor)


def _divisor(norm: Tensor, limit: float) -> Tensor:
    """What gradients are divided by, fp32: 1 where they are short enough, NaN where the norm is not finite."""
    if limit:
        divisor = ((norm + EPSILON) / limit).clamp(min=1)
    else:
        divisor = torch.ones_like(norm)
    return torch.where(norm.isfinite(), divisor, torch.nan).float()
