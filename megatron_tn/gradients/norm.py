"""Global gradient norm over all ranks, with every logical element counted once."""

from collections.abc import Iterable

import torch
from torch import Tensor

from megatron_tn.parallel.collectives import all_reduce_
from megatron_tn.parallel.context import Axis
from megatron_tn.parallel.sharding import ShardSpec


def gradient_norm(
    gradients: Iterable[tuple[ShardSpec, Tensor]], tp: Axis, device: torch.device, *, sharded_over: Axis
) -> Tensor:
    """The L2 norm over all logical elements, [] on `device`, the same on every rank. Collective.

    gradients: (split of the parameter over tensor parallelism, this rank's gradient or a part of it) of each parameter.
    tp: a parameter replicated over tp is counted on tp rank 0 only. Padding rows have zero gradients.
    sharded_over: the axis over whose ranks gradients are partitioned; of size 1 where each rank holds all.
    """
    # fp32 is too coarse for a long sequential sum on a CPU; a GPU reduces by a tree of partial sums.
    precision = torch.float64 if device.type == "cpu" else torch.float32
    counted = [gradient for spec, gradient in gradients if not spec.replicated or tp.rank == 0]
    square = torch.zeros((), dtype=precision, device=device)
    if counted:  # _foreach_norm: a few kernel launches for any number of parameters
        square = torch.stack(torch._foreach_norm(counted, dtype=precision)).square().sum()
    return all_reduce_(all_reduce_(square, sharded_over), tp).sqrt()
