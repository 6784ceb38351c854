"""Builds the optimizer from the settings `optim.*`."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from megatron_tn.config import ConfigError, OptimConfig
from megatron_tn.optim.adamw import MOMENTS, ApexAdamW, TorchAdamW, TritonAdamW
from megatron_tn.optim.muon import Muon
from megatron_tn.optim.protocol import Optimizer

KERNELS = {"triton": TritonAdamW, "torch": TorchAdamW, "apex": ApexAdamW}


def build_optimizer(groups: list[dict], config: OptimConfig, dtype: torch.dtype = torch.float32) -> Optimizer:
    """The optimizer of optim.name.

    groups: parameter groups, from `optim.groups.parameter_groups`. dtype: the computing type (engine.precision), in
    which Muon orthogonalises.

    Raises:
        ConfigError: optim.fused=apex without apex.
    """
    return OPTIMIZERS[config.name].build(groups, config, dtype)


def _muon(groups: list[dict], config: OptimConfig, dtype: torch.dtype) -> Optimizer:
    return Muon(
        groups,
        adamw=lambda others: _adamw(others, config, dtype),
        momentum=config.momentum,
        momentum_warmup_steps=config.momentum_warmup_steps,
        equal_norms=config.equal_norms,
        heads_apart=config.heads_apart,
        dtype=dtype,
    )


def _adamw(groups: list[dict], config: OptimConfig, dtype: torch.dtype) -> Optimizer:
    """AdamW with the kernel of optim.fused; "auto": this package's on a GPU, torch's on a CPU."""
    kernel = config.fused
    if kernel == "auto":
        kernel = "triton" if groups[0]["params"][0].is_cuda else "torch"
    if problems := kernel_problems(config):
        raise ConfigError(problems)
    return KERNELS[kernel](groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)


class Entry(NamedTuple):
    """state_kinds: those of the `Optimizer` that `build` makes; no run goes on from a checkpoint with others."""

    state_kinds: tuple[str, ...]
    build: Callable[[list[dict], OptimConfig, torch.dtype], Optimizer]


OPTIMIZERS = {"adamw": Entry(MOMENTS, _adamw), "muon": Entry(Muon.state_kinds, _muon)}  # by optim.name


def kernel_problems(config: OptimConfig) -> list[str]:
    """One line where the kernel of optim.fused is not installed here."""
    if config.fused == "apex":
        try:
            from apex.optimizers import FusedAdam  # noqa: F401
        except ImportError:
            return [
                "optim.fused=apex, but NVIDIA's apex is not installed: build it from its source "
                "(the package called apex on PyPI is a different project), or set optim.fused=auto"
            ]
    return []
