"""The global gradient norm, in which every logical element counts once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from megatron_tn.parallel.collectives import all_reduce_
from megatron_tn.parallel.context import Axis
from megatron_tn.parallel.sharding import ShardSpec


def gradient_norm(
    gradients: Iterable[tuple[ShardSpec, Tensor]], tp: Axis, device: torch.device, *, sharded_over: Axis
) -> Tensor:
    """The L2 norm over all logical elements, a scalar on `device`, the same on every rank.

    gradients: a parameter's split over tensor parallel, and this rank's gradient of it, or a part of that.
    tp: parameters that its ranks repeat are counted on its first rank. Padding rows have no gradient.
    sharded_over: the axis over whose ranks the parts are spread; of size 1 where each rank holds them whole.
    """
    # A long fp32 sum on a CPU loses digits that a GPU's tree of partial sums keeps.
    precision = torch.float64 if device.type == "cpu" else torch.float32
    counted = [gradient for spec, gradient in gradients if not spec.replicated or tp.rank == 0]
    square = torch.zeros((), dtype=precision, device=device)
    if counted:  # a few kernel launches, whatever the number of parameters
        square = torch.stack(torch._foreach_norm(counted, dtype=precision)).square().sum()
    return all_reduce_(all_reduce_(square, sharded_over), tp).sqrt()
