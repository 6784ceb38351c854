"""Decoding of several prompts at once by the model's forward method, in which engines gather sharded parameters.

`generator.Generator` is faster on a GPU, but its kernels need all parameters of the model on the rank."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from megatron_tn.model.base import IGNORE, Model

SPREAD = 64  # tokens by which the prompts of a batch may differ in length


def batches_of(lengths: Sequence[int], rows: int) -> Iterator[list[int]]:
    """Places of prompts by length, up to `rows` at a time whose lengths differ by SPREAD tokens at most."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) == rows or lengths[place] - lengths[batch[0]] > SPREAD):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


@torch.inference_mode()
def generate_rows(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    choose: Callable[[Tensor, Tensor], Tensor],
    is_done: Callable[[int, list[int]], bool],
    window: int = 256,
) -> list[list[int]]:
    """The ids that follow each prompt (at least one id), up to the one that makes is_done(row, ids) true.

    All rows begin at position 0, so there is no padding: the tokens that every prompt has are processed `window` at a
    time; then one token of each row at a time, the prompt's while it lasts and the chosen one after it.

    choose(logits [B, V], positions int64 [B] of the tokens that they follow) -> ids [B]; ids of rows whose prompt is
    not at its end, or that are done, are dropped. Collective over tensor parallelism.
    """
    device = next(model.parameters()).device
    given = min(map(len, prompts)) - 1
    state = None
    for begin in range(0, given, window):
        piece = torch.tensor([prompt[begin : min(begin + window, given)] for prompt in prompts], device=device)
        ignored = torch.full_like(piece, IGNORE)  # no logits are needed
        state = model(piece, targets=ignored, reduction="none", state=state, return_state=True).state
    found: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    now = [prompt[given] for prompt in prompts]
    place = given
    while running:
        out = model(torch.tensor(now, device=device).unsqueeze(1), state=state, return_state=True)
        positions = torch.full((len(prompts),), place, device=device)
        state, place = out.state, place + 1
        now = choose(out.logits[:, -1], positions).tolist()
        for row, prompt in enumerate(prompts):
            if place < len(prompt):
                now[row] = prompt[place]
            elif row in running:
                found[row].append(now[row])
                if is_done(row, found[row]):
                    running.discard(row)
    return found
