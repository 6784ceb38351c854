"""Decoding: what ends a continuation, and prompts that cannot be continued."""

from __future__ import annotations

import pytest
import torch

from megatron_tn.inference.generator import generate, stream
from megatron_tn.inference.rows import batches_of, generate_rows
from megatron_tn.inference.sampler import Sampler
from tests.helpers.models import TINY, TRANSFORMER, reference_model


def test_decoding_equals_running_the_whole_text_each_time():
    model = reference_model(TINY, seed=1)
    prompt = [1, 5, 9]
    (found,) = generate(model, [prompt], max_new_tokens=12, sampler=Sampler(temperature=0))
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + len(found):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert ids[len(prompt) :] == found


@pytest.mark.parametrize(
    ("config", "window"), [(TINY, 3), (TINY, 256), (TRANSFORMER, 3)], ids=["windows", "whole", "transformer"]
)
def test_prompts_of_different_lengths_decode_as_each_alone(config, window):
    model = reference_model(config, seed=1)
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 101, (length,), generator=draw).tolist() for length in (7, 1, 23, 8)]
    lengths = [5, 1, 9, 12]
    found = generate_rows(
        model,
        prompts,
        choose=lambda logits, positions: logits.argmax(-1),
        is_done=lambda row, ids: len(ids) == lengths[row],
        window=window,
    )
    for prompt, length, ids in zip(prompts, lengths, found, strict=True):
        assert [ids] == generate(model, [prompt], max_new_tokens=length, sampler=Sampler(temperature=0))


def test_batches_have_prompts_of_similar_length():
    assert list(batches_of([100, 3, 5, 70, 4], rows=3)) == [[1, 4, 2], [3, 0]]
    assert list(batches_of([1, 64, 66], rows=3)) == [[0, 1], [2]]
    assert list(batches_of([], rows=3)) == []


def test_it_stops_at_the_end_of_the_document():
    model = reference_model(TINY, seed=1)
    first = next(stream(model, [1], max_new_tokens=1, sampler=Sampler(temperature=0)))
    model.config = type(model.config)(**{**vars(model.config), "eos_id": first})
    assert generate(model, [[1]], max_new_tokens=5, sampler=Sampler(temperature=0)) == [[]]


@pytest.mark.parametrize(("prompt", "message"), [([], "no tokens"), ([200], "holds id 200")], ids=["empty", "outside"])
def test_bad_prompts(prompt, message):
    with pytest.raises(ValueError, match=message):
        generate(reference_model(TINY, 0), [prompt], max_new_tokens=1)


def test_one_prompt_in_the_place_of_many_is_refused():
    with pytest.raises(ValueError, match="the prompt 1 is an id: give a list of prompts"):
        generate(reference_model(TINY, 0), [1, 5, 9], max_new_tokens=1)
