"""The optimizer interface that engines call. Each algorithm has a file beside this one; `optim/build.py` selects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor


class Optimizer(Protocol):
    """Updates fp32 masters in place from their `.grad`, which is fp32 and of the master's shape.

    inner: the torch.optim.Optimizer that holds parameter groups and state; DeepSpeed is initialised with `inner`, and
    replaces the parameters in its groups by flat masters.
    state_kinds: names of the state tensors per master (fp32, of the master's shape). A checkpoint stores each of them
    for every parameter, beside "param", and its manifest lists them.
    whole_matrices: True if each master must be one whole matrix; False if the update is elementwise, so that engines
    may shard masters anywhere and concatenate many into one flat tensor.
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
        """kind -> state tensor, of master's shape, zero before the first step. Writes to it affect the next step."""
        ...

    def set_step(self, step: int) -> None:
        """Set the number of applied steps, t in bias correction. Call after writing to state."""
        ...


def masters_of(optimizer: Optimizer) -> list[Tensor]:
    """Every master in the optimizer's groups, in their order."""
    return [master for group in optimizer.inner.param_groups for master in group["params"]]
