"""Decoding: what ends a continuation, and prompts that cannot be continued."""

from __future__ import annotations

import pytest
import torch

from megatron_tn.inference.generator import generate, stream
from megatron_tn.inference.sampler import Sampler
from tests.helpers.models import TINY, reference_model


def test_decoding_equals_running_the_whole_text_each_time():
    model = reference_model(TINY, seed=1)
    prompt = [1, 5, 9]
    (found,) = generate(model, [prompt], max_new_tokens=12, sampler=Sampler(temperature=0))
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + len(found):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert ids[len(prompt) :] == found


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
