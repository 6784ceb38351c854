"""engine.products=fp8: which layers form their products in fp8, and when their weights are quantised."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from megatron_tn.parallel.linear import ColumnParallelLinear, SplitLinear
from megatron_tn.precision.fp8 import OLDEST_CAPABILITY, Float8Weights, KeptWeights


def float8_layers(blocks: Iterable[nn.Module], bound: float | None) -> list[SplitLinear]:
    """Mark the linear layers of `blocks` for fp8 products, and return them. Modules that write an operand (attribute
    `noting`) are told to note its largest element.

    bound: upper bound of |x| for outputs x of a block's norms, the inputs of column-parallel layers; None: not known.
    """
    for module in (module for block in blocks for module in block.modules()):
        if hasattr(module, "noting"):
            module.noting = True
    layers = [module for block in blocks for module in block.modules() if isinstance(module, SplitLinear)]
    for layer in layers:
        first = layer.together[0] if layer.together else layer
        if layer is first:
            layer.float8 = Float8Weights(bound if isinstance(layer, ColumnParallelLinear) else None)
        else:
            layer.float8 = first.float8
    return layers


def marked_layers(model: nn.Module) -> list[SplitLinear]:
    """The layers of `model` that `float8_layers` marked."""
    return [module for module in model.modules() if isinstance(module, SplitLinear) and module.float8 is not None]


def layer_groups(layers: Iterable[SplitLinear]) -> list[tuple[SplitLinear, ...]]:
    """Groups of layers with a common input, in the layers' order; a layer alone is a group of one."""
    return list(dict.fromkeys(layer.together or (layer,) for layer in layers))


def kept_weights(groups: Sequence[tuple[SplitLinear, ...]], *, transposed: bool) -> Callable[[], None]:
    """Set up `KeptWeights` for groups of layers; returns the function that quantises the weights, to be called after
    each change of them."""
    shapes = [[layer.weight.shape for layer in group] for group in groups]
    device = groups[0][0].weight.device
    kept = KeptWeights([group[0].float8 for group in groups], shapes, device, transposed=transposed)
    return lambda: kept.quantize([[layer.weight.detach() for layer in group] for group in groups])


def products_problems(products: str, device: torch.device) -> list[str]:
    """One line where `device` is a GPU older than the setting engine.products needs. Ada (8.9) multiplies fp8 too, but
    nothing here was measured on it."""
    if products == "bf16" or device.type != "cuda":
        return []
    if (found := torch.cuda.get_device_capability(device)) >= OLDEST_CAPABILITY:
        return []
    oldest, found = (".".join(map(str, each)) for each in (OLDEST_CAPABILITY, found))
    return [
        f"engine.products={products} needs a GPU of compute capability {oldest} (Hopper) or later, and this one has "
        f"{found}: set engine.products=bf16"
    ]
