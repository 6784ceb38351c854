"""The buffer of a decoding step that writes its state every W tokens; see buffered.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class StepBuffer(NamedTuple):
    """What a layer keeps between buffered steps.

    state: [B, H, K, d], fp32 (fp64 for fp64). keys: [B, H, W, K], the features of k; values: [B, H, W, d]; both in the
    type of qkvu. The entries of slots outside start <= j < slot are not read.
    slot: int64 [1], where the next token's key and value go, 0 .. W - 1. start: int64 [B], each row's first slot in
    use. All layers share these two tensors; the caller advances them once a token. fold: whether slot is W - 1, so that
    the next step folds; the caller, who counts steps on the host, says so.
    """

    state: Tensor
    keys: Tensor
    values: Tensor
    slot: Tensor
    start: Tensor
    fold: bool = False

    @classmethod
    def around(cls, state: Tensor, slots: int, dtype: torch.dtype, slot: Tensor, start: Tensor) -> StepBuffer:
        """An empty buffer of `slots` slots, W, with this state; keys and values of `dtype`."""
        batch, heads, summed, width = state.shape
        return cls(
            state,
            torch.zeros(batch, heads, slots, summed, dtype=dtype, device=state.device),
            torch.zeros(batch, heads, slots, width, dtype=dtype, device=state.device),
            slot,
            start,
        )

    def advance(self) -> None:
        """Move on to the next token's slot; after the last one, which folds, every row's first slot is 0."""
        self.slot.add_(1).remainder_(self.keys.shape[2])
        self.start.mul_(self.slot != 0)

    def folded(self, decay: Tensor) -> Tensor:
        """The state after the keys and values of the slots start <= j < slot, [B, H, K, d]; `self` is unchanged."""
        return fold(self, self.slot - 1, decay)


def fold(buffer: StepBuffer, slot: Tensor, decay: Tensor) -> Tensor:
    """The state after the slots start <= j <= slot."""
    wide = buffer.state.dtype
    age, before = ages(slot, buffer.start, buffer.keys.shape[2], decay.to(wide))
    weighted = buffer.keys.to(wide) * age[..., None]
    return buffer.state * before[..., None, None] + weighted.transpose(2, 3) @ buffer.values.to(wide)


def ages(slot: Tensor, start: Tensor, slots: int, decay: Tensor) -> tuple[Tensor, Tensor]:
    """exp(-r (slot - j)) of each slot j, zero where it is not in use [B, H, W]; exp(-r (slot + 1 - start)) [B, H]."""
    j = torch.arange(slots, device=slot.device)
    used = (j >= start[:, None]) & (j <= slot)  # [B, W]
    age = torch.where(used, slot - j, 0)
    weight = torch.exp(-decay[None, :, None] * age[:, None]) * used[:, None]
    return weight, torch.exp(-decay * (slot + 1 - start)[:, None])
