"""Tensor- and context-parallel ranks of one model replica agree on the samples of a step.

Each rank reads the same samples itself, from its node's cache. A rank that cannot read a sample puts padding in its
place; without agreement, the group would train on two different sequences without an error.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tn.parallel.collectives import all_reduce_
from megatron_tn.parallel.context import ParallelContext

IGNORED = -100  # target of a position without a loss


class Microbatch(Protocol):
    """tokens, targets: int64 [b, N], or [1, b * N] with cu_seqlens (target -100: no loss). cu_seqlens: int32 or None.
    The other fields: number of targets other than -100, number of samples b, padding id. Tensors on any device.
    """

    tokens: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None
    target_tokens: int
    samples: int
    pad: int


def agreed_target_tokens(microbatches: Sequence[Microbatch], context: ParallelContext, device: torch.device) -> Tensor:
    """In place, replace a sample by padding on every rank of the tp x cp group if any of them has padding there.
    Returns the number of targets other than -100 in the microbatches, int64 [] on `device`.

    A padding sample has no targets. So the group's minimum of each sample's target count tells which samples to replace
    and how many targets remain: one all-reduce of [samples] per axis, without a host synchronisation.
    """
    if context.tp.size == context.cp.size == 1:
        return torch.full((), sum(batch.target_tokens for batch in microbatches), dtype=torch.int64, device=device)
    counts = torch.cat([(batch.targets.to(device).view(batch.samples, -1) != IGNORED).sum(1) for batch in microbatches])
    for axis in (context.tp, context.cp):
        all_reduce_(counts, axis, dist.ReduceOp.MIN)
    for batch, lost in zip(microbatches, (counts == 0).split([batch.samples for batch in microbatches]), strict=True):
        _make_padding(batch, lost.to(batch.tokens.device))
    return counts.sum()


def _make_padding(batch: Microbatch, lost: Tensor) -> None:
    """Fill the samples in `lost`, bool [b], as the token stream fills an unreadable one: pad ids, no targets, one
    segment per sample."""
    batch.tokens.view(batch.samples, -1).masked_fill_(lost.unsqueeze(1), batch.pad)
    batch.targets.view(batch.samples, -1).masked_fill_(lost.unsqueeze(1), IGNORED)
    if batch.cu_seqlens is not None:
        starts, total = batch.cu_seqlens, batch.tokens.numel()
        length = total // batch.samples
        sample = (starts // length).clamp(max=batch.samples - 1)
        inside = lost[sample] & (starts % length != 0)
        starts.copy_(starts.masked_fill(inside, total).sort().values)
