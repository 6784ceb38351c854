"""The ranks that compute one model replica's step agree on its samples: tensor and context parallel ranks.

Each of them reads the same samples for itself, from the cache of its own node. Where one cannot read a sample, it has
padding in its place, and the group would train on two different sequences, without an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tn.parallel.collectives import all_reduce_
from megatron_tn.parallel.context import ParallelContext

IGNORED = -100  # the target that no loss counts


class Microbatch(Protocol):
    """tokens, targets [b, N] int64, or [1, b * N] with cu_seqlens (target -100 counts for nothing); cu_seqlens int32 or
    None; how many targets count; b, the number of samples; the id of padding. The tensors may be on the device already.
    """

    tokens: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None
    target_tokens: int
    samples: int
    pad: int


def agreed_target_tokens(microbatches: Sequence[Microbatch], context: ParallelContext, device: torch.device) -> Tensor:
    """Makes a sample padding on every rank of the tp x cp group if it is padding on one of them, in place. Returns how
    many targets count over the microbatches, int64 [] on `device`.

    Padding is what has no target. So the minimum over the group of each sample's targets tells both which samples are
    lost and how many targets the others have: one reduction of [samples] an axis, of which the host waits for none.
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
    """Fills the samples that are `lost`, bool [b], as the stream fills one that it cannot read: pad ids, no targets,
    one segment from the sample's start to its end."""
    batch.tokens.view(batch.samples, -1).masked_fill_(lost.unsqueeze(1), batch.pad)
    batch.targets.view(batch.samples, -1).masked_fill_(lost.unsqueeze(1), IGNORED)
    if batch.cu_seqlens is not None:
        starts, total = batch.cu_seqlens, batch.tokens.numel()
        length = total // batch.samples
        sample = (starts // length).clamp(max=batch.samples - 1)
        inside = lost[sample] & (starts % length != 0)
        starts.copy_(starts.masked_fill(inside, total).sort().values)
