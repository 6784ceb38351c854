"""Samples (sequences) and batches for the trainer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from data_pipeline.stream.state import Damage

IGNORED = -100  # target of a position without a loss


@dataclass(frozen=True)
class Sample:
    """`tokens`, `targets`: int64 [N]; `document_starts`: int64 [segments], positions where a document, its continuation
    (at 0) or padding begins; `damage`: set if the sample could not be read and is padding."""

    tokens: torch.Tensor
    targets: torch.Tensor
    document_starts: torch.Tensor
    damage: Damage | None = None


@dataclass(frozen=True)
class Batch:
    """Without isolation `tokens`, `targets` are int64 [b, N] and `cu_seqlens` is None. With it they are [1, b * N], and
    `cu_seqlens` is int32 [b * max_documents + 1]: 0, the start of each segment, then b * N repeated to the end.
    `indices`: the global sample indices, in order; `target_tokens`: number of targets other than -100, as a host
    integer; `damaged`: the samples that could not be read and are padding; `pad`: padding id."""

    tokens: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor | None
    indices: tuple[int, ...]
    target_tokens: int
    damaged: tuple[Damage, ...] = ()
    pad: int = 0

    @property
    def samples(self) -> int:
        """b, the number of samples."""
        return len(self.indices)


def collate(indices: Sequence[int], samples: Sequence[Sample], max_documents: int | None, pad: int) -> Batch:
    """A batch of stacked samples or, if `max_documents` (per sample) is given, of concatenated samples with
    cu_seqlens."""
    tokens = torch.stack([sample.tokens for sample in samples])
    targets = torch.stack([sample.targets for sample in samples])
    damaged = tuple(sample.damage for sample in samples if sample.damage)
    counted = int((targets != IGNORED).sum())
    if max_documents is None:
        return Batch(tokens, targets, None, tuple(indices), counted, damaged, pad)
    length = tokens.shape[1]
    cu_seqlens = torch.full((len(samples) * max_documents + 1,), tokens.numel(), dtype=torch.int32)
    starts = torch.cat([sample.document_starts + place * length for place, sample in enumerate(samples)])
    cu_seqlens[: len(starts)] = starts
    return Batch(tokens.view(1, -1), targets.view(1, -1), cu_seqlens, tuple(indices), counted, damaged, pad)
