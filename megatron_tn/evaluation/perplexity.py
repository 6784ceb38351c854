"""Negative log-likelihood of documents under a model: held-out loss and bits per byte, by source and by position."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_tn.evaluation.scores import row_scores
from megatron_tn.model.base import Model

AFTER = "heldout_loss/after_"  # + 2^k: a journal's figure of the predictions after 2^k to 2^(k+1) - 1 tokens


@dataclass
class Sums:
    """nats: negative log-likelihood of `tokens` predicted tokens (eos included, bos not), which stand for `text_bytes`
    bytes of UTF-8 text."""

    nats: float = 0.0
    tokens: int = 0
    text_bytes: int = 0

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.text_bytes if self.text_bytes else math.nan

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    def add(self, nats: float, tokens: int, text_bytes: int) -> None:
        self.nats += nats
        self.tokens += tokens
        self.text_bytes += text_bytes


@dataclass(frozen=True)
class Documents:
    """Held-out documents. tokens: ids int64 [n] of each, bos first. text_bytes, sources: UTF-8 bytes and name of the
    source of each. token_bytes int64 [V]: UTF-8 bytes that each id stands for; None where that is not known."""

    tokens: list[np.ndarray]
    text_bytes: list[int]
    sources: list[str]
    token_bytes: np.ndarray | None = None


@dataclass
class HeldOut(Sums):
    """Sums over all documents. sources: by source, in the order of the documents. positions: by the number of tokens
    before them in the document, also where a model began afresh among these (model.max_length): 2^k -> sums over
    predictions after 2^k to 2^(k+1) - 1 tokens; text_bytes is 0 where the bytes of a token are not known."""

    documents: int = 0
    sources: dict[str, Sums] = field(default_factory=dict)
    positions: dict[int, Sums] = field(default_factory=dict)


def document_nats(model: Model, documents: Sequence[np.ndarray], **options) -> list[float]:
    """Negative log-likelihood in nats of each document (ids [n], bos first), given its first id. options: of
    `row_scores`."""
    found = [0.0] * len(documents)
    for scores in row_scores(model, documents, **options):
        found[scores.index] = float(scores.nats.sum(dtype=np.float64))
    return found


def evaluate_documents(model: Model, documents: Documents, **options) -> HeldOut:
    """Sums of the negative log-likelihood over documents. options: of `row_scores`."""
    found = HeldOut(documents=len(documents.tokens))
    found.sources = {name: Sums() for name in documents.sources}
    longest = max(map(len, documents.tokens))
    bins = np.frexp(np.arange(1, longest))[1] - 1  # [i]: k of the prediction after i + 1 tokens, 2^k <= i + 1 < 2^(k+1)
    sums = np.zeros((3, bins.max(initial=0) + 1))  # nats, tokens and bytes of each k
    for scores in row_scores(model, documents.tokens, **options):
        ids = documents.tokens[scores.index]
        nats = scores.nats.astype(np.float64)
        part = bins[: len(nats)]
        sums[0] += np.bincount(part, nats, len(sums[0]))
        sums[1] += np.bincount(part, minlength=len(sums[1]))
        if documents.token_bytes is not None:
            sums[2] += np.bincount(part, documents.token_bytes[ids[1:]], len(sums[2]))
        of_document = float(nats.sum()), len(ids) - 1, documents.text_bytes[scores.index]
        found.add(*of_document)
        found.sources[documents.sources[scores.index]].add(*of_document)
    found.positions = {2**k: Sums(n, int(t), int(b)) for k, (n, t, b) in enumerate(sums.T.tolist()) if t}
    return found
