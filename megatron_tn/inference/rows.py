"""Decoding of several prompts at once by the model's forward method, in which engines gather sharded parameters.

`generator.Generator` is faster on a GPU, but its kernels need all parameters of the model on the rank."""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tn.inference.sampler import Plan, Sampler, SamplingRows, sample
from megatron_tn.model.base import IGNORE, Model
from megatron_tn.parallel.collectives import all_reduce_, gather_objects
from megatron_tn.parallel.context import Axis

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


def generate_shared(
    model: Model,
    prompts: Sequence[Sequence[int]],
    samplers: Sequence[Sampler],
    keys: Sequence[int],
    *,
    is_done: Callable[[int, list[int]], bool],
    rows: int,
    window: int = 256,
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """(Places, the ids that follow the prompt at each) of every batch of up to `rows` prompts, see `batches_of`: of
    fewer where D ranks with the same parameters can so share the prompts evenly.

    samplers, keys: of each prompt; a key, `uniform.stream_key`, determines its random numbers. is_done(place, ids):
    whether a prompt's continuation is at its end.
    Collective over the ranks of model.context, which all have the same prompts. Of every D batches each of the D ranks
    generates one; then all get the ids of all.
    """
    share = model.context.data
    batches = list(batches_of(list(map(len, prompts)), _even_rows(len(prompts), rows, share.size)))
    for start in range(0, len(batches), share.size):
        together = batches[start : start + share.size]
        mine = together[share.rank] if share.rank < len(together) else []
        own = [[values[place] for place in mine] for values in (prompts, samplers, keys)]
        found = _sampled(model, *own, lambda row, ids, mine=mine: is_done(mine[row], ids), window)
        yield from zip(together, gather_objects(found, share), strict=False)  # the last ranks may have no batch


def _even_rows(prompts: int, rows: int, ranks: int) -> int:
    """Rows of a batch, at most `rows`, of as few batches a rank as `rows` allows, equally many on each rank."""
    batches = ranks * -(-prompts // (rows * ranks))
    return -(-prompts // max(batches, 1))


def _sampled(
    model: Model,
    prompts: Sequence[Sequence[int]],
    samplers: Sequence[Sampler],
    keys: Sequence[int],
    is_done: Callable[[int, list[int]], bool],
    window: int,
) -> list[list[int]]:
    sampling = SamplingRows(len(prompts), model.config.vocab_size, next(model.parameters()).device)
    for row, settings in enumerate(zip(samplers, keys, prompts, strict=True)):
        sampling.set(row, *settings)
    plan = Plan.of(samplers, model.config.vocab_size)
    return generate_rows(
        model,
        prompts,
        choose=lambda logits, positions: sample(logits, sampling, positions, plan),
        is_done=is_done,
        window=window,
    )


@torch.inference_mode()
def generate_rows(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    choose: Callable[[Tensor, Tensor], Tensor],
    is_done: Callable[[int, list[int]], bool],
    window: int,
) -> list[list[int]]:
    """The ids that follow each prompt (at least one id), up to the one that makes is_done(row, ids) true.

    All rows begin at position 0, so there is no padding: the tokens that every prompt has are processed `window` at a
    time; then one token of each row at a time, the prompt's while it lasts and the chosen one after it.

    choose(logits [B, V], positions int64 [B] of the tokens that they follow) -> ids [B]; ids of rows whose prompt is
    not at its end, or that are done, are dropped.
    Collective over the ranks of model.context. Those with the same parameters have prompts of their own, or none. They
    run equally many forward passes, since engines gather parameters in these: a rank whose rows are done runs padding.
    """
    device, share = next(model.parameters()).device, model.context.data
    padding = torch.zeros(1, 1, dtype=torch.int64, device=device)
    given = min(map(len, prompts), default=1) - 1
    state = None
    for begin in range(0, _most(given, share, device), window):
        if begin >= given:
            model(padding, targets=padding, reduction="none", return_state=True)
            continue
        piece = torch.tensor([prompt[begin : min(begin + window, given)] for prompt in prompts], device=device)
        ignored = torch.full_like(piece, IGNORE)  # no logits are needed
        state = model(piece, targets=ignored, reduction="none", state=state, return_state=True).state
    found: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    now = [prompt[given] for prompt in prompts]
    place = given
    while _most(len(running), share, device):
        if not running:
            model(padding, return_state=True)
            continue
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


def _most(count: int, share: Axis, device: torch.device) -> int:
    """The largest count of the ranks of `share`."""
    if share.size == 1:
        return count
    return int(all_reduce_(torch.tensor(count, device=device), share, dist.ReduceOp.MAX))
