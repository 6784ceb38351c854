"""One optimizer step, whatever the engine and the layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tn.device.host_copy import HostCopy
from megatron_tn.engine.base import Engine
from megatron_tn.parallel.collectives import all_reduce_
from megatron_tn.training.agreement import Microbatch, agreed_target_tokens


class StepReport(NamedTuple):
    """What a step did.

    loss: mean over all the step's target tokens, in nats. tokens: how many those were. applied: False when nothing
    changed, because the gradient was not finite or the batch was skipped. stop: some rank was told to stop. skipped:
    the batch was not trained on; its loss and gradient norm are NaN. empty: because it has no target tokens.
    """

    loss: float
    tokens: int
    lr: float
    grad_norm: float
    applied: bool
    stop: bool
    skipped: bool = False
    empty: bool = False

    @property
    def finite(self) -> bool:
        return self.applied and math.isfinite(self.loss)


def skipped_step(lr: float, *, stop: bool = False) -> StepReport:
    """The step of a batch that is not trained on: it counts for the schedule and for nothing else. Collective.

    stop: whether this rank was told to stop.
    """
    return StepReport(math.nan, 0, lr, math.nan, applied=False, stop=anywhere(stop), skipped=True)


def anywhere(here: bool) -> bool:
    """Whether something holds on any rank. Collective, on the CPU: a GPU is not waited for."""
    flag = torch.tensor(int(here))
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def run_microbatch(engine: Engine, batch: Microbatch, scale: Tensor, device: torch.device, *, last: bool) -> Tensor:
    """Forward and backward of one microbatch; returns scale x the sum of its token losses, on the device."""
    return engine.forward_backward(
        batch.tokens.to(device, non_blocking=True),
        batch.targets.to(device, non_blocking=True),
        None if batch.cu_seqlens is None else batch.cu_seqlens.to(device, non_blocking=True),
        scale=scale,
        last=last,
    )


def train_step(
    engine: Engine, microbatches: Sequence[Microbatch], lr: float, device: torch.device, *, stop: bool = False
) -> StepReport:
    """Forward and backward over this rank's microbatches, then one update. Collective.

    The target tokens of the whole step are counted first, over microbatches and data-parallel ranks, and every token's
    loss is divided by that one number: each token weighs the same, however unevenly padding falls. Context-parallel
    ranks are given the same sequences, and count them once; the model cuts them into slices. A sample that a rank of
    the tensor- and context-parallel group could not read is padding on all of them (see `agreed_target_tokens`). A step
    without target tokens changes nothing.
    """
    context = engine.context
    count = agreed_target_tokens(microbatches, context, device)
    all_reduce_(count, context.dp)
    scale = 1 / count.clamp(min=1)
    loss = torch.zeros((), device=device)
    for index, batch in enumerate(microbatches):
        loss += run_microbatch(engine, batch, scale, device, last=index == len(microbatches) - 1)
    # Tensor-parallel ranks hold the same loss. One reduction over the world tells every rank the loss of all and
    # whether any of them was told to stop.
    summary = torch.stack([loss / context.tp.size, torch.full((), float(stop), device=device)])
    if context.world_size > 1:
        dist.all_reduce(summary)
    # The copy to the host is queued before engine.step, which waits for the device anyway: reading it afterwards waits
    # no second time, and the host prepares the next step while the optimizer runs.
    figures = HostCopy(torch.cat([summary.double(), count.view(1)]))
    result = engine.step(lr, tokens=count)
    mean_loss, stops, tokens = figures.read().tolist()
    if not tokens:
        return StepReport(math.nan, 0, lr, math.nan, applied=False, stop=stops > 0, skipped=True, empty=True)
    return StepReport(mean_loss, int(tokens), lr, result.grad_norm, result.applied, stops > 0)
