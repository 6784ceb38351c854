"""Negative log-likelihood of documents under a model, for held-out loss, perplexity and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_tn.evaluation.windows import windows
from megatron_tn.model.base import IGNORE, Model

# Batches are padded to a multiple of 16 tokens: Triton specialises kernels on divisibility of lengths by 16.
ALIGNMENT = 16


@dataclass(frozen=True)
class HeldOut:
    """Sums over documents. nats: negative log-likelihood; tokens: number of predicted tokens (eos included, bos not);
    text_bytes: UTF-8 bytes of the texts."""

    nats: float
    tokens: int
    text_bytes: int
    documents: int

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.text_bytes

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens


@torch.no_grad()
def document_nats(
    model: Model,
    documents: Sequence[np.ndarray],
    *,
    batch_tokens: int = 4096,
    window: int = 256,
    progress: Callable[[int, int], None] = lambda documents, tokens: None,
) -> list[float]:
    """Negative log-likelihood in nats of each document (ids [n], bos first), given its first id.

    A batch has batch_tokens // window documents of similar length. The model runs on `window` tokens at a time, from
    the recurrent state after the preceding window: every token sees its document's whole past in bounded memory. A
    model that is built for sequences of config.max_length tokens begins afresh after as many.
    progress(n, tokens): called after each batch of n documents, of so many tokens.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(documents)), key=lambda i: -len(documents[i]))
    rows = max(batch_tokens // window, 1)
    nats = [0.0] * len(documents)
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        longest = -(-len(documents[chosen[0]]) // ALIGNMENT) * ALIGNMENT
        tokens = np.zeros((len(chosen), longest), dtype=np.int64)
        targets = np.full((len(chosen), longest), IGNORE, dtype=np.int64)
        for row, index in enumerate(chosen):
            ids = documents[index]
            tokens[row, : len(ids)] = ids
            targets[row, : len(ids) - 1] = ids[1:]
        lengths = [len(documents[index]) for index in chosen]
        sums = _row_nats(
            model, torch.from_numpy(tokens).to(device), torch.from_numpy(targets).to(device), lengths, window
        )
        for index, value in zip(chosen, sums.tolist(), strict=True):
            nats[index] = value
        progress(len(chosen), sum(lengths))
    return nats


def _row_nats(model: Model, tokens: Tensor, targets: Tensor, lengths: list[int], window: int) -> Tensor:
    """tokens, targets [B, N], lengths [B] descending -> summed loss of each row in nats, fp64 [B].

    Each window runs only for the rows whose documents extend into it, to avoid padding.
    """
    total = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)
    state = None
    for begin, end, afresh in windows(tokens.shape[1], window, model.config.max_length):
        rows = sum(length > begin for length in lengths)
        if not rows:
            break
        state = None if afresh else state.first_rows(rows)
        piece = (slice(rows), slice(begin, end))
        out = model(tokens[piece], targets=targets[piece], reduction="none", state=state, return_state=True)
        total[:rows] += out.loss.double().sum(1)
        state = out.state
    return total


def evaluate_documents(model: Model, documents: Sequence[np.ndarray], text_bytes: Sequence[int], **options) -> HeldOut:
    """Sum `document_nats` over documents. text_bytes: UTF-8 bytes of each document's text."""
    nats = document_nats(model, documents, **options)
    tokens = sum(len(ids) - 1 for ids in documents)
    return HeldOut(math.fsum(nats), tokens, sum(text_bytes), len(documents))
