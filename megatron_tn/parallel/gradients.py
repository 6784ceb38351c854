"""The global gradient norm, with each logical element counted once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from megatron_tn.parallel.collectives import all_reduce_
from megatron_tn.parallel.context import Axis
from megatron_tn.parallel.sharding import ShardSpec


def gradient_norm(
    gradients: Iterable[tuple[ShardSpec, Tensor]],
    axis: Axis,
    device: torch.device,
    *,
    sharded_over: Axis = Axis(),  # noqa: B008 (frozen)
) -> Tensor:
    """Norm over all logical elements, a scalar, the same on every rank of `axis`.

    Parameters that tensor-parallel ranks repeat are counted on the first of them only. Padding rows have no gradient.
    sharded_over: the axis over which the gradients given are parts, if they are.
    """
    # On a CPU a long fp32 sum loses digits that the GPU's tree of partial sums keeps.
    precision = torch.float64 if device.type == "cpu" else torch.float32
    counted = [gradient for spec, gradient in gradients if not spec.replicated or axis.rank == 0]
    square = torch.zeros((), dtype=precision, device=device)
    if counted:  # in a few launches, however many parameters there are
        square = torch.stack(torch._foreach_norm(counted, dtype=precision)).square().sum()
    return all_reduce_(all_reduce_(square, sharded_over), axis).sqrt()
