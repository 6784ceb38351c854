"""Builds the optimizer from the settings `optim.*`."""

from __future__ import annotations

from megatron_tn.config import ConfigError, OptimConfig
from megatron_tn.optim.adamw import ApexAdamW, TorchAdamW, TritonAdamW
from megatron_tn.optim.protocol import Optimizer

KERNELS = {"triton": TritonAdamW, "torch": TorchAdamW, "apex": ApexAdamW}


def build_optimizer(groups: list[dict], config: OptimConfig) -> Optimizer:
    """AdamW with the kernel of optim.fused; "auto": this package's on a GPU, torch's on a CPU.

    groups: parameter groups, from `optim.groups.parameter_groups`.

    Raises:
        ConfigError: optim.fused=apex without apex.
    """
    kernel = config.fused
    if kernel == "auto":
        kernel = "triton" if groups[0]["params"][0].is_cuda else "torch"
    try:
        return KERNELS[kernel](groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)
    except ImportError:
        raise ConfigError(
            "optim.fused=apex, but NVIDIA's apex is not installed: build it from its source "
            "(the package called apex on PyPI is a different project), or set optim.fused=auto"
        ) from None
