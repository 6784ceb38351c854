"""What the training loop and the checkpoints need of an engine, whichever shards the optimizer."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_tn.model.transnormer import TransNormerLM
from megatron_tn.optim.adamw import FusedAdamW
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.parallel.sharding import OwnedRange

MOMENTS = ("exp_avg", "exp_avg_sq")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class StepResult(NamedTuple):
    """grad_norm: global gradient norm before clipping. applied: False when it was not finite and nothing changed."""

    grad_norm: float
    applied: bool


class Engine(Protocol):
    """Owns the model's gradients, fp32 masters and optimizer."""

    model: TransNormerLM
    context: ParallelContext
    partitioned: bool  # whether owned ranges differ between data-parallel ranks, or are repeated on each

    def forward_backward(
        self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor | None, *, scale: Tensor, last: bool
    ) -> Tensor:
        """One microbatch: loss = scale x sum of token losses, backward; returns that loss, detached.

        Over microbatches and data-parallel ranks gradients are summed: `scale` alone turns the sum into a mean.
        `last` is true for the step's last microbatch.
        """
        ...

    def step(self, lr: float) -> StepResult:
        """Clip, update with learning rate `lr`, clear gradients. All ranks take the same decision."""
        ...

    def named_logical_gradients(self) -> dict[str, Tensor]:
        """After the last microbatch, before step: released name -> whole gradient, reduced over ranks. Collective."""
        ...

    def owned_ranges(self) -> list[OwnedRange]:
        """All that this rank owns, in a fixed order."""
        ...

    def refresh(self, optimizer_step: int) -> None:
        """After owned ranges were written: bring the model's parameters in line, and set the step AdamW has counted."""
        ...


def optimizer_state(optimizer: torch.optim.Optimizer, master: Tensor) -> dict[str, Tensor]:
    """What AdamW keeps of `master`: moments, zero before the first step, and the number of steps (not in apex's)."""
    if isinstance(optimizer, FusedAdamW):
        return optimizer.state_of(master)
    state = optimizer.state[master]
    for moment in MOMENTS:
        if moment not in state:
            state[moment] = torch.zeros_like(master, requires_grad=False)
    state.setdefault("step", torch.zeros((), device=master.device))
    return state


def set_optimizer_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """AdamW's bias correction counts steps: per parameter in torch, per group in apex."""
    if not isinstance(optimizer, torch.optim.AdamW):
        for group in optimizer.param_groups:
            group["step"] = step  # apex makes it at its first step, and would begin at one
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"].fill_(step)
