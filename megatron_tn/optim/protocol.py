"""The optimizer interface that engines call. Each algorithm has a file beside this one; `optim/build.py` selects."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor


class Optimizer(Protocol):
    """Updates fp32 masters in place from their `.grad`, which is fp32 and of the master's shape.

    inner: the torch.optim.Optimizer that holds parameter groups and state; DeepSpeed is initialised with `inner`, and
    replaces the parameters in its groups by flat masters.
    state_kinds: names of all state tensors (fp32, of the master's shape). A master has those that `state_of` returns; a
    checkpoint stores them for its parameters, beside "param", and the manifest lists them.
    whole_matrices: False if the update is elementwise. True if it needs whole matrices of some masters, as Muon's does:
    it then has `Muon.rounds` and `Muon.weight_decays`. Either way engines may shard masters anywhere and concatenate
    many into one flat tensor.
    copies: master -> the same elements in the computing type, of the master's shape. Every applied step casts the new
    master into its copy.
    """

    inner: torch.optim.Optimizer
    state_kinds: tuple[str, ...]
    whole_matrices: bool
    copies: Mapping[Tensor, Tensor]

    def step(self, lr: float, divisor: Tensor) -> None:
        """One update with learning rate `lr` and gradients / divisor. divisor: fp32 [] on the masters' device; if it is
        not finite, masters, state and copies stay unchanged."""
        ...

    def undo(self) -> None:
        """After a step whose divisor was not finite: subtract that step from the count of bias correction."""
        ...

    def state_of(self, master: Tensor) -> dict[str, Tensor]:
        """kind -> state tensor, of master's shape, zero before the first step, for some of `state_kinds`. Writes to it
        affect the next step."""
        ...

    def set_step(self, step: int) -> None:
        """Set the number of applied steps, t in bias correction. Call after writing to state."""
        ...


def masters_of(optimizer: Optimizer) -> list[Tensor]:
    """Every master in the optimizer's groups, in their order."""
    return [master for group in optimizer.inner.param_groups for master in group["params"]]
