"""One optimizer step, whatever the engine and the layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tn.device.host_copy import HostCopy
from megatron_tn.engine.base import Engine
from megatron_tn.parallel.collectives import all_reduce_


class Microbatch(Protocol):
    """tokens, targets [b, N] int64 (target -100 counts for nothing); cu_seqlens int32 or None; how many targets count.
    The tensors may be on the device already."""

    tokens: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None
    target_tokens: int


class StepReport(NamedTuple):
    """What a step did.

    loss: mean over all the step's target tokens, nats. tokens: how many those were. applied: False when the gradient
    was not finite and nothing changed. stop: some rank was told to stop. skipped: the batch was not trained on, or had
    no target tokens: it says nothing of the model, and its loss is NaN.
    """

    loss: float
    tokens: int
    lr: float
    grad_norm: float
    applied: bool
    stop: bool
    skipped: bool = False

    @property
    def finite(self) -> bool:
        return self.applied and math.isfinite(self.loss)


def skipped_step(lr: float, *, stop: bool = False) -> StepReport:
    """The step of a batch that is not trained on: it counts for the schedule and for nothing else."""
    return StepReport(math.nan, 0, lr, math.nan, applied=False, stop=stop, skipped=True)


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
    """Forward and backward over this rank's microbatches, then one update.

    The target tokens of the whole step are counted first, over microbatches and data-parallel ranks, and every loss is
    divided by that one number: each token weighs the same, however unevenly padding falls. Context-parallel ranks are
    given the same sequences, and count them once; the model cuts them into slices.
    """
    context = engine.context
    count = torch.full((), sum(batch.target_tokens for batch in microbatches), dtype=torch.int64, device=device)
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
    # Copied before the engine decides, which waits for the device: reading it afterwards waits no second time, and the
    # host prepares the next step while the optimizer runs.
    figures = HostCopy(torch.cat([summary.double(), count.view(1)]))
    result = engine.step(lr)
    mean_loss, stops, tokens = figures.read().tolist()
    mean_loss = mean_loss if tokens else math.nan
    return StepReport(mean_loss, int(tokens), lr, result.grad_norm, result.applied, stops > 0, skipped=not tokens)
