"""From settings to an optimizer."""

from __future__ import annotations

from megatron_tn.config import ConfigError, OptimConfig
from megatron_tn.optim.adamw import ApexAdamW, TorchAdamW, TritonAdamW
from megatron_tn.optim.protocol import Optimizer

KERNELS = {"triton": TritonAdamW, "torch": TorchAdamW, "apex": ApexAdamW}


def build_optimizer(groups: list[dict], config: OptimConfig) -> Optimizer:
    """AdamW by the kernel that optim.fused names; "auto" is this package's on a GPU and torch's on a CPU.

    groups: of `parameter_groups`.

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
