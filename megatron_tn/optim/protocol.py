"""What an engine needs of an optimizer. An adapter a library lives beside this file; `optim/build.py` picks one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor


class Optimizer(Protocol):
    """Updates fp32 masters in place from their `.grad`, which is fp32 and of the master's shape.

    inner: the torch.optim.Optimizer that holds parameter groups and state; DeepSpeed is handed this one, and puts its
    own flat masters into its groups.
    state_kinds: the tensors kept of a master, fp32 of its shape. They name what a checkpoint holds of a parameter
    beside "param", and are recorded in its manifest.
    whole_matrices: whether a master must be one whole matrix; False if the update is elementwise, so that engines may
    cut masters anywhere and lay many into one flat tensor.
    copies: master -> the parameter, or part of one, in the computing type, of the master's shape. Every step that is
    applied leaves the new master there, rounded.
    """

    inner: torch.optim.Optimizer
    state_kinds: tuple[str, ...]
    whole_matrices: bool
    copies: Mapping[Tensor, Tensor]

    def step(self, lr: float, divisor: Tensor) -> None:
        """One update with learning rate `lr` and gradients / divisor. divisor: fp32 [] on the masters' device; where it
        is not finite, masters, state and copies stay as they are."""
        ...

    def undo(self) -> None:
        """The last step's divisor turned out not to be finite: that step does not count for bias correction."""
        ...

    def state_of(self, master: Tensor) -> dict[str, Tensor]:
        """kind -> its tensor, of master's shape, zero before the first step. What is written there is used."""
        ...

    def set_step(self, step: int) -> None:
        """Set the number of applied steps, which bias correction counts, and learn of state that was written."""
        ...


def masters_of(optimizer: Optimizer) -> list[Tensor]:
    """Every master in the optimizer's groups, in their order."""
    return [master for group in optimizer.inner.param_groups for master in group["params"]]
