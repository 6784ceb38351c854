"""fp8_weights=true: the matrices of the blocks kept in fp8, one byte an element, for decoding and evaluation.

W[n, k] = weight_scale[n] * weight[n, k], with weight in e4m3 and a scale for each output n (kernels/float8_linear).
What is multiplied with them stays in the computing type, as do the embedding with its tied head, norms and theta.
"""

import torch
import torch.distributed as dist
from torch import nn

from kernels.float8_linear.op import TYPE, obstacle, quantize_rows
from megatron_tn.config import ConfigError
from megatron_tn.parallel.collectives import all_reduce_
from megatron_tn.parallel.linear import RowParallelLinear, SplitLinear
from megatron_tn.parallel.sharding import ShardSpec, mark

BAND_ELEMENTS = 1 << 22  # quantised at a time: 13 bytes each in temporaries


def check_device(device: torch.device) -> None:
    """
    Raises:
        ConfigError: a GPU that cannot convert fp8 numbers.
    """
    if problem := obstacle(device):
        raise ConfigError(f"fp8_weights=true cannot be used: {problem}")


def keep_in_fp8(model: nn.Module) -> None:
    """Replace the weight of every `SplitLinear` of `model`; its parameters take no gradients from here on.

    A row's scale is of the logical matrix, so that the numbers do not depend on the layout. Collective over tensor
    parallelism.

    Raises:
        ConfigError: a GPU that cannot convert fp8 numbers.
    """
    check_device(next(model.parameters()).device)
    model.requires_grad_(False)
    for layer in model.modules():
        if isinstance(layer, SplitLinear) and layer.weight_scale is None:
            keep_layer_in_fp8(layer)


@torch.no_grad()
def keep_layer_in_fp8(layer: SplitLinear) -> None:
    """`keep_in_fp8` of one layer. Beside both weights memory holds fp32 copies of BAND_ELEMENTS elements."""
    weight, spec = layer.weight, layer.weight.shard_spec
    height = max(1, BAND_ELEMENTS // weight.shape[1])
    largest = torch.cat([band.abs().amax(1) for band in weight.split(height)]).float()
    rows = ShardSpec(spec.shape[:1])
    if isinstance(layer, RowParallelLinear):  # a rank has a part of every row
        all_reduce_(largest, layer.axis, dist.ReduceOp.MAX)
    else:
        rows = ShardSpec(spec.shape[:1], dim=0, blocks=spec.blocks)
    data, scale = torch.empty_like(weight, dtype=TYPE), torch.empty_like(largest)
    bands = zip(*(tensor.split(height) for tensor in (weight, largest, data, scale)), strict=True)
    for band, most, band_data, band_scale in bands:
        for out, found in zip((band_data, band_scale), quantize_rows(band, most), strict=True):
            out.copy_(found)
    layer.weight = mark(nn.Parameter(data, requires_grad=False), spec)
    layer.weight_scale = mark(nn.Parameter(scale, requires_grad=False), rows)


def keeps_fp8(model: nn.Module) -> bool:
    """Whether `keep_in_fp8` was called."""
    return any(parameter.dtype == TYPE for parameter in model.parameters())
