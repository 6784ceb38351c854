"""One training step, for every engine and parallel layout."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tn.device.host_copy import HostCopy
from megatron_tn.engine.base import Engine
from megatron_tn.parallel.collectives import all_reduce_
from megatron_tn.parallel.world import anywhere
from megatron_tn.training.agreement import Microbatch, agreed_target_tokens


class StepReport(NamedTuple):
    """The result of a step.

    loss: mean over all target tokens of the step, in nats. tokens: number of target tokens. applied: False when the
    weights are unchanged, because of a non-finite gradient or a skipped batch. stop: some rank received a stop signal.
    skipped: no training on the batch; loss and gradient norm are NaN. empty: skipped for lack of target tokens.
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
    """The report of a step whose batch is skipped: it only advances the schedule. Collective.

    stop: whether this rank received a stop signal.
    """
    return StepReport(math.nan, 0, lr, math.nan, applied=False, stop=anywhere(stop), skipped=True)


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
    loss is divided by that count: each token has the same weight, however padding is distributed. Context-parallel
    ranks get the same sequences, counted once; the model cuts them into slices. A sample that one rank of the tensor-
    and context-parallel group could not read becomes padding on all of them (see `agreed_target_tokens`). A step
    without target tokens changes nothing.
    """
    context = engine.context
    count = agreed_target_tokens(microbatches, context, device)
    all_reduce_(count, context.dp)
    scale = 1 / count.clamp(min=1)
    loss = torch.zeros((), device=device)
    for index, batch in enumerate(microbatches):
        loss += run_microbatch(engine, batch, scale, device, last=index == len(microbatches) - 1)
    # Tensor-parallel ranks hold the same loss. One all-reduce over the world sums the loss and the stop flags.
    summary = torch.stack([loss / context.tp.size, torch.full((), float(stop), device=device)])
    if context.world_size > 1:
        dist.all_reduce(summary)
    # The copy to the host is queued before engine.step, which synchronises with the device anyway: reading the copy
    # afterwards needs no second wait, and the host prepares the next step while the optimizer runs.
    figures = HostCopy(torch.cat([summary.double(), count.view(1)]))
    result = engine.step(lr, tokens=count)
    mean_loss, stops, tokens = figures.read().tolist()
    if not tokens:
        return StepReport(math.nan, 0, lr, math.nan, applied=False, stop=stops > 0, skipped=True, empty=True)
    return StepReport(mean_loss, int(tokens), lr, result.grad_norm, result.applied, stops > 0)
