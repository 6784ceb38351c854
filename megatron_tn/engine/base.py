"""What the training loop and the checkpoints need of an engine, whichever shards the optimizer."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from megatron_tn.config import TrainConfig
from megatron_tn.engine.update import Shards, StepResult, Update
from megatron_tn.model.base import Model
from megatron_tn.optim.build import build_optimizer
from megatron_tn.optim.groups import parameter_groups
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.parallel.sharding import OwnedRange

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Engine(Protocol):
    """Owns the model's gradients, fp32 masters and optimizer.

    partitioned: whether data-parallel ranks own different ranges, or each of them all.
    """

    model: Model
    context: ParallelContext
    partitioned: bool

    def forward_backward(
        self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor | None, *, scale: Tensor, last: bool
    ) -> Tensor:
        """One microbatch: loss = scale x sum of token losses, and its gradients; returns that loss, detached.

        tokens, targets [b, N] int64. Over microbatches and data-parallel ranks gradients are summed: `scale` alone
        turns the sum into a mean. last: whether this is the step's last microbatch.
        """
        ...

    def step(self, lr: float, tokens: Tensor | None = None) -> StepResult:
        """Clip, update with learning rate `lr`, clear gradients. All ranks take the same decision.

        tokens: the step's target tokens over all ranks, [] on the device; where they are 0 nothing changes.
        """
        ...

    def named_logical_gradients(self) -> dict[str, Tensor]:
        """After the last microbatch, before step: released name -> whole gradient, reduced over ranks. Collective."""
        ...

    @property
    def state_kinds(self) -> tuple[str, ...]:
        """What the optimizer keeps of each master: the kinds of `owned_ranges` beside "param"."""
        ...

    def owned_ranges(self) -> list[OwnedRange]:
        """All that this rank owns, in a fixed order."""
        ...

    def refresh(self, optimizer_step: int) -> None:
        """After owned ranges were written: the model's parameters follow, and the optimizer has applied that many
        steps. Collective."""
        ...


class UpdatingEngine:
    """The part of `Engine` that is `Update`'s, for engines to inherit."""

    model: Model
    context: ParallelContext
    update: Update

    def step(self, lr: float, tokens: Tensor | None = None) -> StepResult:
        return self.update.step(lr, tokens)

    @property
    def state_kinds(self) -> tuple[str, ...]:
        return self.update.optimizer.state_kinds

    def owned_ranges(self) -> list[OwnedRange]:
        return self.update.owned_ranges()

    def refresh(self, optimizer_step: int) -> None:
        self.update.refresh(optimizer_step)


def build_update(model: Model, shards: Shards, config: TrainConfig) -> Update:
    """The optimizer over `shards`, which hold a master of as many dimensions for each parameter, in the model's
    order."""
    named = [
        (place.name, master, master.dim()) for place, master in zip(shards.placements, shards.masters, strict=True)
    ]
    optimizer = build_optimizer(parameter_groups(named, config.optim.weight_decay), config.optim)
    return Update(optimizer, shards, model.shard_specs(), model.context.tp, clip_norm=config.optim.clip_norm)
