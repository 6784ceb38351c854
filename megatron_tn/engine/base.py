"""The engine interface that the training loop and checkpoints call, the same for local, DeepSpeed and FSDP2."""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from megatron_tn.config import TrainConfig
from megatron_tn.engine.shards import Shards
from megatron_tn.engine.update import StepResult, Update
from megatron_tn.gradients.phase import Phase
from megatron_tn.model.base import Model
from megatron_tn.optim.build import build_optimizer
from megatron_tn.optim.groups import parameter_groups
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.parallel.sharding import OwnedRange

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Engine(Protocol):
    """Owns the model's gradients, fp32 masters and optimizer.

    partitioned: True if each data-parallel rank owns different ranges of the masters; False if each owns all of them.
    """

    model: Model
    context: ParallelContext
    partitioned: bool

    def forward_backward(
        self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor | None, *, scale: Tensor, last: bool
    ) -> Tensor:
        """One microbatch: loss = scale x sum of token losses, forward and backward; returns the loss, detached.

        tokens, targets [b, N] int64. Gradients are summed over microbatches and data-parallel ranks; `scale` alone
        turns the sum into a mean. last: whether this is the step's last microbatch.

        Raises:
            RuntimeError: the step's last microbatch has been added, and `step` was not called since.
        """
        ...

    def step(self, lr: float, tokens: Tensor | None = None) -> StepResult:
        """Clip, update with learning rate `lr`, clear gradients. All ranks take the same decision.

        tokens: number of target tokens of the step over all ranks, [] on the device; 0 skips the update.

        Raises:
            RuntimeError: no microbatch with last=True was added since the previous step.
        """
        ...

    def named_logical_gradients(self) -> dict[str, Tensor]:
        """After the last microbatch, before step: released name -> whole gradient, reduced over ranks. Collective."""
        ...

    @property
    def state_kinds(self) -> tuple[str, ...]:
        """Names of all of the optimizer's state tensors; each parameter has some of them, see `OwnedRange.values`."""
        ...

    def owned_ranges(self) -> list[OwnedRange]:
        """Views of the masters and optimizer state that this rank owns, in a fixed order."""
        ...

    def refresh(self, optimizer_step: int) -> None:
        """After a write to the owned ranges: copy the masters to the model's parameters on every rank, and set the
        optimizer's step count to `optimizer_step`. Collective."""
        ...

    def whole_weights(self) -> AbstractContextManager:
        """Context manager within which passes without gradients may run: with engine.products=fp8 weights are otherwise
        in fp8 alone. Collective."""
        ...


class UpdatingEngine:
    """Base class of the engines: the order of calls within a step, and the methods of `Engine` that call `Update`."""

    model: Model
    context: ParallelContext
    update: Update

    def __init__(self) -> None:
        self.phase = Phase()

    def forward_backward(
        self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor | None, *, scale: Tensor, last: bool
    ) -> Tensor:
        self.phase.add(last)
        return self._forward_backward(tokens, targets, cu_seqlens, scale, last)

    def _forward_backward(
        self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor | None, scale: Tensor, last: bool
    ) -> Tensor:
        raise NotImplementedError

    def step(self, lr: float, tokens: Tensor | None = None) -> StepResult:
        self.phase.take()
        return self._step(lr, tokens)

    def _step(self, lr: float, tokens: Tensor | None) -> StepResult:
        return self.update.step(lr, tokens)

    @property
    def state_kinds(self) -> tuple[str, ...]:
        return self.update.optimizer.state_kinds

    def owned_ranges(self) -> list[OwnedRange]:
        return self.update.owned_ranges()

    def refresh(self, optimizer_step: int) -> None:
        self.update.refresh(optimizer_step)

    def whole_weights(self) -> AbstractContextManager:
        return nullcontext() if self.update.float8 is None else self.update.float8.whole()


def build_update(model: Model, shards: Shards, config: TrainConfig) -> Update:
    """An optimizer over `shards`, and its `Update`. `shards` must hold one master per parameter, in the model's order
    and with the parameter's number of dimensions."""
    named = [
        (place.name, master, master.dim()) for place, master in zip(shards.placements, shards.masters, strict=True)
    ]
    optimizer = build_optimizer(parameter_groups(named, config.optim), config.optim, DTYPES[config.engine.precision])
    return Update(optimizer, shards, model.shard_specs(), model.context.tp, clip_norm=config.optim.clip_norm)
