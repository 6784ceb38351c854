"""Each token's negative log-likelihood under a model: what held-out figures and benchmark tasks are summed from."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_tn.evaluation.windows import windows
from megatron_tn.model.base import IGNORE, DecodingState, Model

# Batches are padded to a multiple of 16 tokens: Triton specialises kernels on divisibility of lengths by 16.
ALIGNMENT = 16
SHORTEST = 64  # tokens that a row of a batch counts for at least: each row has a decoding state, however short it is


class RowScores(NamedTuple):
    """index: of the row. nats fp32 [n - first]: of each scored token, given all tokens before it. greedy [n - first]:
    whether it is the likeliest token there; None where that was not asked for."""

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
    progress(n, tokens): called after each batch of n rows, of so many tokens. Collective over tensor parallelism.
    """
    first = first or [1] * len(rows)
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    start = 0
    while start < len(order):
        longest = -(-len(rows[order[start]]) // ALIGNMENT) * ALIGNMENT
        count = max(batch_tokens // max(min(window, longest), SHORTEST), batch_tokens // window, 1)
        chosen = order[start : start + count]
        start += count
        tokens = np.zeros((len(chosen), longest), dtype=np.int64)
        targets = np.full((len(chosen), longest), IGNORE, dtype=np.int64)
        for row, index in enumerate(chosen):
            ids = rows[index]
            tokens[row, : len(ids)] = ids
            targets[row, first[index] - 1 : len(ids) - 1] = ids[first[index] :]
        lengths = [len(rows[index]) for index in chosen]
        nats, hits = _batch_scores(model, tokens, targets, lengths, window, device, greedy)
        for row, index in enumerate(chosen):
            part = slice(first[index] - 1, len(rows[index]) - 1)
            yield RowScores(index, nats[row, part], hits[row, part] if greedy else None)
        progress(len(chosen), sum(lengths))


def _batch_scores(
    model: Model,
    tokens: np.ndarray,
    targets: np.ndarray,
    lengths: list[int],
    window: int,
    device: torch.device,
    greedy: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """tokens, targets [B, N], lengths [B] descending -> nats fp32 [B, N] and hits bool [B, N].

    Each window runs only for the rows that extend into it, to avoid padding; after the last there is no state.
    """
    nats = torch.zeros(tokens.shape, dtype=torch.float32, device=device)
    hits = torch.zeros(tokens.shape, dtype=torch.bool, device=device)
    state: DecodingState | None = None
    for begin, end, afresh in windows(tokens.shape[1], window, model.config.max_length):
        rows = sum(length > begin for length in lengths)
        if not rows:  # all else is padding
            break
        state = None if afresh else state.first_rows(rows)
        piece = (slice(rows), slice(begin, end))
        wanted = torch.from_numpy(targets[piece]).to(device)
        inputs = torch.from_numpy(tokens[piece]).to(device)
        goes_on = lengths[0] > end
        if greedy and (targets[piece] != IGNORE).any():
            out = model(inputs, state=state, return_state=goes_on)
            nats[piece], hits[piece] = _from_logits(out.logits, wanted)
        else:
            out = model(inputs, targets=wanted, reduction="none", state=state, return_state=goes_on)
            nats[piece] = out.loss
        state = out.state
    return nats.cpu().numpy(), hits.cpu().numpy()


def _from_logits(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """logits [B, N, V], targets [B, N] -> -log softmax(logits)[target] fp32 [B, N], 0 where ignored; argmax == target.
    fp32 copies are made of the scored positions alone."""
    scored = targets != IGNORE
    chosen, wanted = logits[scored].float(), targets[scored]
    nats = torch.zeros(targets.shape, dtype=torch.float32, device=targets.device)
    nats[scored] = chosen.logsumexp(-1) - chosen.gather(-1, wanted.unsqueeze(-1)).squeeze(-1)
    return nats, logits.argmax(-1) == targets
