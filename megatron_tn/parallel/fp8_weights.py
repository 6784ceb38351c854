"""fp8_weights=true: the matrices of the blocks kept in fp8, one byte an element, for decoding and evaluation.

W[n, k] = weight_scale[n] * weight[n, k], with weight in e4m3 and a scale for each output n (kernels/float8_linear).
What is multiplied with them stays in the computing type, as do the embedding with its tied head, norms and theta.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from kernels.float8_linear.op import TYPE, obstacle, quantize_rows
from megatron_tn.config import ConfigError
from megatron_tn.parallel.collectives import all_reduce_
from megatron_tn.parallel.linear import RowParallelLinear, SplitLinear
from megatron_tn.parallel.sharding import ShardSpec, mark


@torch.no_grad()
def keep_in_fp8(model: nn.Module) -> None:
    """Replace the weight of every `SplitLinear` of `model`; its parameters take no gradients from here on.

    A row's scale is of the logical matrix, so that the numbers do not depend on the layout. Collective over tensor
    parallelism.

    Raises:
        ConfigError: a GPU that cannot convert fp8 numbers.
    """
    if problem := obstacle(next(model.parameters()).device):
        raise ConfigError(f"fp8_weights=true cannot be used: {problem}")
    model.requires_grad_(False)
    for layer in model.modules():
        if not isinstance(layer, SplitLinear) or layer.weight_scale is not None:
            continue
        weight, spec = layer.weight, layer.weight.shard_spec
        largest = weight.abs().amax(1).float()
        rows = ShardSpec(spec.shape[:1])
        if isinstance(layer, RowParallelLinear):  # a rank has a part of every row
            all_reduce_(largest, layer.axis, dist.ReduceOp.MAX)
        else:
            rows = ShardSpec(spec.shape[:1], dim=0, blocks=spec.blocks)
        data, scale = quantize_rows(weight, largest)
        layer.weight = mark(nn.Parameter(data, requires_grad=False), spec)
        layer.weight_scale = mark(nn.Parameter(scale, requires_grad=False), rows)


def keeps_fp8(model: nn.Module) -> bool:
    """Whether `keep_in_fp8` was called."""
    return any(parameter.dtype == TYPE for parameter in model.parameters())
