"""Which parameters are decayed, and the optimizer that updates them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from megatron_tn.config import ConfigError, OptimConfig
from megatron_tn.optim.adamw import FusedAdamW


def is_decayed(name: str, dimensions: int) -> bool:
    """Weight decay is for matrices. Norm weights and LRPE's theta set scales and frequencies, and are left alone."""
    return dimensions == 2 and not name.endswith(".theta")


def parameter_groups(named: Iterable[tuple[str, nn.Parameter, int]], weight_decay: float) -> list[dict]:
    """(name, tensor to optimise, dimensions of the parameter) -> optimizer groups: decayed, then the rest."""
    named = list(named)
    decayed = [tensor for name, tensor, dimensions in named if is_decayed(name, dimensions)]
    rest = [tensor for name, tensor, dimensions in named if not is_decayed(name, dimensions)]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_adamw(groups: list[dict], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101), by the kernel that optim.fused names; "auto" is this package's on a GPU, torch's on a
    CPU.

    Raises:
        ConfigError: optim.fused=apex without apex.
    """
    settings = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.fused == "apex":
        try:
            from apex.optimizers import FusedAdam
        except ImportError:
            raise ConfigError(
                "optim.fused=apex, but NVIDIA's apex is not installed: build it from its source "
                "(the package called apex on PyPI is a different project), or set optim.fused=auto"
            ) from None
        return FusedAdam(groups, adam_w_mode=True, **settings)
    if config.fused == "triton" or (config.fused == "auto" and groups[0]["params"][0].is_cuda):
        return FusedAdamW(groups, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)
