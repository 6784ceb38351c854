"""engine.products=fp8: which layers form their products in fp8, and when their weights are quantised."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from megatron_tn.config import ConfigError
from megatron_tn.parallel.linear import SplitLinear
from megatron_tn.precision.fp8 import OLDEST_CAPABILITY, Float8Weight


def float8_layers(blocks: Iterable[nn.Module]) -> list[SplitLinear]:
    """Mark the linear layers of `blocks` for fp8 products, and return them."""
    layers = [module for block in blocks for module in block.modules() if isinstance(module, SplitLinear)]
    for layer in layers:
        layer.float8 = Float8Weight()
    return layers


def keep_weights(layers: list[SplitLinear]) -> None:
    """Quantise the weights; after every change of them."""
    for layer in layers:
        layer.float8.keep(layer.weight)


def check_device(device: torch.device) -> None:
    """
    Raises:
        ConfigError: a GPU older than Hopper. Ada (8.9) multiplies fp8 too, but nothing here was measured on it.
    """
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < OLDEST_CAPABILITY:
        oldest, found = (".".join(map(str, each)) for each in (OLDEST_CAPABILITY, found))
        raise ConfigError(
            f"engine.products=fp8 needs a GPU of compute capability {oldest} (Hopper) or later, and this one has "
            f"{found}"
        )
