"""Each token's negative log-likelihood under a model: what held-out figures and benchmark tasks are summed from."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_tn.evaluation.windows import Window, windows
from megatron_tn.model.base import IGNORE, DecodingState, Model
from megatron_tn.parallel.collectives import all_gather
from megatron_tn.parallel.context import Axis

# Batches are padded to a multiple of 16 tokens: Triton specialises kernels on divisibility of lengths by 16.
ALIGNMENT = 16
SHORTEST = 64  # tokens that a row of a batch counts for at least: each row has a decoding state, however short it is


class RowScores(NamedTuple):
    """index: of the row. nats fp32 [n - first]: of each scored token, given all tokens before it. greedy [n - first]:
    whether (0, 1) it is the likeliest token there; None where that was not asked for."""

    index: int
    nats: np.ndarray
    greedy: np.ndarray | None


@torch.no_grad()
def row_scores(
    model: Model,
    rows: Sequence[np.ndarray],
    first: Sequence[int] | None = None,
    *,
    batch_tokens: int = 4096,
    window: int = 256,
    greedy: bool = False,
    progress: Callable[[int, int], None] = lambda rows, tokens: None,
) -> Iterator[RowScores]:
    """The scores of tokens first[i], first[i] + 1, ... of rows[i] (ids [n], n >= 1), the longest rows first.

    first: at least 1, since a row's first token is given; None means 1 for all rows.
    batch_tokens: a batch has batch_tokens // window rows of similar length, and more of rows shorter than a window.
    The model runs on `window` tokens at a time, from the decoding state after the preceding window: every token sees
    its row's whole past in bounded memory, and scores depend neither on the window nor on the batch. A model that is
    built for sequences of config.max_length tokens begins afresh after each so many.
    greedy: logits [rows, window, V] are formed in each window that has a scored token.
    progress(n, tokens): called after each batch of n rows, of so many tokens.
    Collective over the ranks of model.context, which all have the same rows. Of every D batches each of D ranks with
    the same parameters computes one, in as many forward passes as the others, since engines gather parameters in
    these; then all get the scores of all.
    """
    share = model.context.data
    first = first or [1] * len(rows)
    device = next(model.parameters()).device
    batches = _batches(list(map(len, rows)), batch_tokens, window)
    for start in range(0, len(batches), share.size):
        together = batches[start : start + share.size]
        shapes = [(len(chosen), _aligned(len(rows[chosen[0]]))) for chosen in together]
        mine = together[share.rank] if share.rank < len(together) else []
        longest = len(rows[together[0][0]])
        passes = windows(_aligned(longest), window, model.config.max_length)
        passes = [each for each in passes if each.begin < longest]  # beyond it all is padding
        scores = _batch_scores(model, [(rows[index], first[index]) for index in mine], passes, device, greedy)
        every = [_of_all(part, max(map(math.prod, shapes)), share) for part in scores[: 1 + greedy]]
        for number, (chosen, shape) in enumerate(zip(together, shapes, strict=True)):
            nats, *hits = (part[number, : math.prod(shape)].reshape(shape) for part in every)
            for row, index in enumerate(chosen):
                part = slice(first[index] - 1, len(rows[index]) - 1)
                yield RowScores(index, nats[row, part], hits[0][row, part] if greedy else None)
            progress(len(chosen), sum(len(rows[index]) for index in chosen))


def _aligned(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT


def _batches(lengths: list[int], batch_tokens: int, window: int) -> list[list[int]]:
    """Indexes of the rows of each batch, by descending length."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    found, start = [], 0
    while start < len(order):
        longest = _aligned(lengths[order[start]])
        count = max(batch_tokens // max(min(window, longest), SHORTEST), batch_tokens // window, 1)
        found.append(order[start : start + count])
        start += count
    return found


def _of_all(scores: Tensor, most: int, share: Axis) -> np.ndarray:
    """Every rank's scores [B, N], flattened and padded to `most` of them: [ranks, most]."""
    padded = torch.nn.functional.pad(scores.flatten(), (0, most - scores.numel()))
    return all_gather(padded[None], share).cpu().numpy()


def _batch_scores(
    model: Model,
    batch: Sequence[tuple[np.ndarray, int]],
    passes: Sequence[Window],
    device: torch.device,
    greedy: bool,
) -> tuple[Tensor, Tensor]:
    """batch: ids [n] of each row, the longest first, and the first token to score -> nats fp32 [B, N] and hits uint8
    [B, N].

    Each window runs only for the rows that extend into it, to avoid padding, and where none does, for padding alone;
    after a row's last window there is no state.
    """
    lengths = [len(ids) for ids, _ in batch]
    tokens = np.zeros((len(batch), _aligned(max(lengths, default=0))), dtype=np.int64)
    targets = np.full(tokens.shape, IGNORE, dtype=np.int64)
    for row, (ids, first) in enumerate(batch):
        tokens[row, : len(ids)] = ids
        targets[row, first - 1 : len(ids) - 1] = ids[first:]
    nats = torch.zeros(tokens.shape, dtype=torch.float32, device=device)
    hits = torch.zeros(tokens.shape, dtype=torch.uint8, device=device)
    state: DecodingState | None = None
    for begin, end, afresh in passes:
        rows = sum(length > begin for length in lengths)
        if not rows:
            padding = torch.zeros(1, min(ALIGNMENT, end - begin), dtype=torch.int64, device=device)
            model(padding, targets=padding, reduction="none", return_state=model.splits_tokens)
            continue
        state = None if afresh else state.first_rows(rows)
        piece = (slice(rows), slice(begin, end))
        wanted = torch.from_numpy(targets[piece]).to(device)
        inputs = torch.from_numpy(tokens[piece]).to(device)
        options = {"state": state, "return_state": lengths[0] > end or model.splits_tokens}
        if greedy and (targets[piece] != IGNORE).any():
            out = model(inputs, **options)
            nats[piece], hits[piece] = _from_logits(out.logits, wanted)
        else:
            out = model(inputs, targets=wanted, reduction="none", **options)
            nats[piece] = out.loss
        state = out.state
    return nats, hits


def _from_logits(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """logits [B, N, V], targets [B, N] -> -log softmax(logits)[target] fp32 [B, N], 0 where ignored; argmax == target.
    fp32 copies are made of the scored positions alone."""
    scored = targets != IGNORE
    chosen, wanted = logits[scored].float(), targets[scored]
    nats = torch.zeros(targets.shape, dtype=torch.float32, device=targets.device)
    nats[scored] = chosen.logsumexp(-1) - chosen.gather(-1, wanted.unsqueeze(-1)).squeeze(-1)
    return nats, logits.argmax(-1) == targets
