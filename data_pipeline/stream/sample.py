"""Sequences and batches as the trainer receives them."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from data_pipeline.stream.state import Damage

IGNORED = -100  # the target that no loss counts


@dataclass(frozen=True)
class Sample:
    """`tokens`, `targets`: int64 [N]; `document_starts`: int64 [segments], the places where a document, or a document's
    continuation (at 0), or padding begins; `damage`: set when the sample is padding because it could not be read."""

    tokens: torch.Tensor
    targets: torch.Tensor
    document_starts: torch.Tensor
    damage: Damage | None = None


@dataclass(frozen=True)
class Batch:
    """Without isolation `tokens`, `targets` are int64 [b, N] and `cu_seqlens` is None. With it they are [1, b * N], and
    `cu_seqlens` is int32 [b * max_documents + 1]: 0, the start of each segment, then b * N repeated to the end.
    `indices`: the global sample indices, in order; `target_tokens`: how many targets count, known without asking the
    device that the tensors may be on; `damaged`: the samples that could not be read and are padding; `pad`: the id that
    padding consists of."""

    tokens: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor | None
    indices: tuple[int, ...]
    target_tokens: int
    damaged: tuple[Damage, ...] = ()
    pad: int = 0

    @property
    def samples(self) -> int:
        """b: how many samples the tensors hold."""
        return len(self.indices)


def collate(indices: Sequence[int], samples: Sequence[Sample], max_documents: int | None, pad: int = 0) -> Batch:
    """Samples side by side, or end to end with their boundaries when `max_documents` (a sample) is given."""
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


def batches_hash(batches: Iterable[Batch]) -> str:
    """sha256 over indices, tokens and targets of batches in order, however they are cut: equal for a global batch read
    as one and for the same read in shares and concatenated."""
    parts = [hashlib.sha256() for _ in range(3)]
    for batch in batches:
        for part, values in zip(parts, (torch.tensor(batch.indices), batch.tokens, batch.targets), strict=True):
            part.update(values.contiguous().numpy().tobytes())
    return hashlib.sha256(b"".join(part.digest() for part in parts)).hexdigest()
