"""Optimizer parameter groups: with and without weight decay."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def is_decayed(name: str, dimensions: int) -> bool:
    """Weight decay applies to matrices, not to norm weights (scales) or LRPE's theta (frequencies)."""
    return dimensions == 2 and not name.endswith(".theta")


def parameter_groups(named: Iterable[tuple[str, Tensor, int]], weight_decay: float) -> list[dict]:
    """(name, tensor to optimise, dimensions of the logical parameter) -> non-empty groups, the decayed one first."""
    named = list(named)
    decayed = [tensor for name, tensor, dimensions in named if is_decayed(name, dimensions)]
    rest = [tensor for name, tensor, dimensions in named if not is_decayed(name, dimensions)]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
