"""Sampling and decoding."""

from __future__ import annotations

import pytest
import torch

from megatron_tn import ParallelContext, load_pretrained
from megatron_tn.inference.generator import generate
from megatron_tn.inference.rows import batches_of, generate_rows
from megatron_tn.inference.sampler import Sampler
from tests.helpers.golden import golden
from tests.helpers.models import TINY, reference_model
from tests.helpers.ranks import run_ranks

LOGITS = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))


def draws(sampler: Sampler, count: int = 4000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    found = torch.cat([sampler(LOGITS, generator) for _ in range(count)])
    return torch.bincount(found, minlength=4) / count


def test_sampling_follows_the_probabilities():
    assert draws(Sampler(temperature=1)).tolist() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)


def test_temperature_sharpens():
    weights = torch.tensor([0.5, 0.3, 0.15, 0.05]) ** 2
    assert draws(Sampler(temperature=0.5)).tolist() == pytest.approx((weights / weights.sum()).tolist(), abs=0.03)


def test_zero_temperature_takes_the_likeliest():
    assert draws(Sampler(temperature=0), 10).tolist() == [1, 0, 0, 0]


def test_top_k_keeps_the_likeliest():
    assert draws(Sampler(temperature=1, top_k=2)).tolist() == pytest.approx([5 / 8, 3 / 8, 0, 0], abs=0.03)


def test_top_p_keeps_the_fewest_that_reach_it():
    assert draws(Sampler(temperature=1, top_p=0.6)).tolist() == pytest.approx([5 / 8, 3 / 8, 0, 0], abs=0.03)


@pytest.mark.parametrize(
    ("sampler", "problem"),
    [
        (Sampler(temperature=-1), "temperature=-1 must be at least 0"),
        (Sampler(top_k=-1), "top_k=-1 must be at least 0"),
        (Sampler(top_p=0), "top_p=0 must be above 0"),
    ],
    ids=["temperature", "top_k", "top_p"],
)
def test_settings_that_make_no_sense_are_named(sampler, problem):
    assert any(problem in line for line in sampler.problems())


def test_decoding_equals_running_the_whole_text_each_time():
    model = reference_model(TINY, seed=1)
    prompt = [1, 5, 9]
    found = list(generate(model, prompt, max_new_tokens=12, sampler=Sampler(temperature=0)))
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + len(found):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert ids[len(prompt) :] == found


@pytest.mark.parametrize("window", [3, 256])
def test_prompts_of_different_lengths_decode_as_each_alone(window):
    model = reference_model(TINY, seed=1)
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 101, (length,), generator=draw).tolist() for length in (7, 1, 23, 8)]
    lengths = [5, 1, 9, 12]
    found = generate_rows(
        model,
        prompts,
        choose=lambda rows, logits: logits.argmax(-1),
        is_done=lambda row, ids: len(ids) == lengths[row],
        window=window,
    )
    for prompt, length, ids in zip(prompts, lengths, found, strict=True):
        assert ids == list(generate(model, prompt, max_new_tokens=length, sampler=Sampler(temperature=0)))


def test_batches_have_prompts_of_similar_length():
    assert list(batches_of([100, 3, 5, 70, 4], rows=3)) == [[1, 4, 2], [3, 0]]
    assert list(batches_of([1, 64, 66], rows=3)) == [[0, 1], [2]]
    assert list(batches_of([], rows=3)) == []


def decode(tp: int) -> list[int]:
    model = load_pretrained(golden("heads4").directory, ParallelContext.create(tp=tp))
    return list(generate(model, [1, 2, 3], max_new_tokens=16, sampler=Sampler(temperature=1.0), seed=3))


def test_tensor_parallel_ranks_say_the_same_as_one():
    alone = decode(1)
    assert run_ranks(2, decode, 2) == [alone, alone]


def test_it_stops_at_the_end_of_the_document():
    model = reference_model(TINY, seed=1)
    first = next(iter(generate(model, [1], max_new_tokens=1, sampler=Sampler(temperature=0))))
    model.config = type(model.config)(**{**vars(model.config), "eos_id": first})
    assert list(generate(model, [1], max_new_tokens=5, sampler=Sampler(temperature=0))) == []


@pytest.mark.parametrize(("prompt", "message"), [([], "no tokens"), ([200], "holds id 200")], ids=["empty", "outside"])
def test_bad_prompts(prompt, message):
    with pytest.raises(ValueError, match=message):
        list(generate(reference_model(TINY, 0), prompt, max_new_tokens=1, sampler=Sampler()))
