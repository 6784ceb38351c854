"""A small trained model, and the plain recurrence that every way to decode must agree with."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_tn.inference import decoder
from megatron_tn.model.base import Model
from tests.helpers.models import TINY, reference_model

SHAPE = dataclasses.replace(TINY, layers=2, heads=4)


def sequences(rows: int, length: int, seed: int) -> Tensor:
    """Ids [rows, length] of a rule with some noise: the next id depends on the last one and on the position."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 101, (rows, length), generator=draw)
    noise = torch.rand(rows, length, generator=draw) < 0.05
    for t in range(1, length):
        ids[:, t] = torch.where(noise[:, t], ids[:, t], 3 + (5 * ids[:, t - 1] + t // 4) % 97)
    return ids


def trained_model(steps: int = 40) -> Model:
    """In fp32, in about two seconds once a process: its greedy continuations follow their prompts and do not stand
    still."""
    model = reference_model(SHAPE, seed=1, dtype=torch.float32)
    model.load_state_dict(_trained_weights(steps))
    return model


@functools.cache
def _trained_weights(steps: int) -> dict[str, Tensor]:
    model = reference_model(SHAPE, seed=1, dtype=torch.float32)
    train(model, steps)
    return model.state_dict()


def train(model: Model, steps: int, rate: float = 1e-2) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0)
    for step in range(steps):
        ids = sequences(32, 25, seed=step).to(model.lm_head.weight.device)
        optimizer.zero_grad()
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()


def prompts(lengths: Sequence[int] = (1, 9, 2, 40, 17, 5)) -> list[list[int]]:
    return [[1, *sequences(1, length, seed=100 + length)[0].tolist()][:length] for length in lengths]


@torch.no_grad()
def plain(model: Model, prompt: Sequence[int], count: int) -> tuple[list[int], Tensor]:
    """The `count` likeliest ids after `prompt` and the logits [count, V] that they were taken from, by the recurrence
    in fp64: one token at a time from the very first."""
    exact = reference_model(model.config, seed=0)
    exact.load_state_dict(model.state_dict())
    state, logits, ids = None, [], list(prompt)
    for at in range(len(prompt) + count - 1):
        out = exact(torch.tensor([[ids[at]]]), state=state, return_state=True)
        state = out.state
        if at >= len(prompt) - 1:
            logits.append(out.logits[0, 0])
            ids.append(int(logits[-1].argmax()))
    return ids[len(prompt) :], torch.stack(logits)


@contextlib.contextmanager
def recorded_logits() -> Iterator[list[Tensor]]:
    """The logits [B, V] of every step that decoders run or capture within the block."""
    found, sample = [], decoder.sample

    def recording(logits, *given):
        found.append(logits.float().clone())
        return sample(logits, *given)

    decoder.sample = recording
    try:
        yield found
    finally:
        decoder.sample = sample
