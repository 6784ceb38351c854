"""Sampling and decoding."""

from __future__ import annotations

import pytest
import torch

from megatron_tn import load_pretrained
from megatron_tn.inference.generator import generate, stream
from megatron_tn.inference.sampler import Plan, Sampler, SamplingRows, sample
from megatron_tn.inference.uniform import stream_key
from tests.helpers.golden import golden
from tests.helpers.models import TINY, reference_model
from tests.helpers.ranks import layout, run_shared

LOGITS = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))


def draws(*samplers: Sampler, count: int = 4000) -> list[list[float]]:
    """Shares of the ids that each sampler draws from LOGITS, all in one batch."""
    rows = SamplingRows(len(samplers), 4, torch.device("cpu"))
    for row, sampler in enumerate(samplers):
        rows.set(row, sampler, stream_key(0, row), {0})
    for name, value in vars(rows).items():
        setattr(rows, name, value.repeat_interleave(count, 0))
    positions = torch.arange(count).repeat(len(samplers))
    found = sample(LOGITS.repeat(len(positions), 1), rows, positions, Plan.of(samplers, 4))
    return [(torch.bincount(part, minlength=4) / count).tolist() for part in found.view(len(samplers), count)]


def test_sampling_follows_the_probabilities_of_each_rows_own_settings():
    sharp = (torch.tensor([0.5, 0.3, 0.15, 0.05]) ** 2 / 0.365).tolist()
    wanted = {
        Sampler(temperature=1): [0.5, 0.3, 0.15, 0.05],
        Sampler(temperature=0.5): sharp,
        Sampler(temperature=0): [1, 0, 0, 0],
        Sampler(temperature=1, top_k=2): [5 / 8, 3 / 8, 0, 0],
        Sampler(temperature=1, top_p=0.6): [5 / 8, 3 / 8, 0, 0],
        Sampler(temperature=1, top_k=3, top_p=0.6): [5 / 8, 3 / 8, 0, 0],
        Sampler(temperature=0, repetition_penalty=2.0): [0, 1, 0, 0],
        Sampler(temperature=1, repetition_penalty=2.0): [1 / 3, 0.4, 0.2, 0.2 / 3],
    }
    for each in wanted:
        if each.temperature == 0 or each.repetition_penalty == 1:
            assert draws(each)[0] == pytest.approx(wanted[each], abs=0.03), each
    for found, shares in zip(draws(*wanted), wanted.values(), strict=True):
        assert found == pytest.approx(shares, abs=0.03)


@pytest.mark.parametrize(
    ("sampler", "problem"),
    [
        (Sampler(temperature=-1), "temperature=-1 must be at least 0"),
        (Sampler(top_k=-1), "top_k=-1 must be at least 0"),
        (Sampler(top_p=0), "top_p=0 must be above 0"),
        (Sampler(repetition_penalty=0), "repetition_penalty=0 must be above 0"),
    ],
    ids=["temperature", "top_k", "top_p", "repetition_penalty"],
)
def test_settings_that_make_no_sense_are_named(sampler, problem):
    assert any(problem in line for line in sampler.problems())


def test_decoding_equals_running_the_whole_text_each_time():
    model = reference_model(TINY, seed=1)
    prompt = [1, 5, 9]
    (found,) = generate(model, [prompt], max_new_tokens=12, sampler=Sampler(temperature=0))
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + len(found):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert ids[len(prompt) :] == found


def decode(tp: int) -> list[int]:
    model = load_pretrained(golden("heads4").directory, layout(tp))
    return generate(model, [[1, 2, 3]], max_new_tokens=16, sampler=Sampler(temperature=1.0), seed=3)[0]


def test_tensor_parallel_ranks_say_the_same_as_one():
    alone = decode(1)
    assert run_shared(2, decode, 2) == [alone, alone]


def test_it_stops_at_the_end_of_the_document():
    model = reference_model(TINY, seed=1)
    first = next(stream(model, [1], max_new_tokens=1, sampler=Sampler(temperature=0)))
    model.config = type(model.config)(**{**vars(model.config), "eos_id": first})
    assert generate(model, [[1]], max_new_tokens=5, sampler=Sampler(temperature=0)) == [[]]


@pytest.mark.parametrize(("prompt", "message"), [([], "no tokens"), ([200], "holds id 200")], ids=["empty", "outside"])
def test_bad_prompts(prompt, message):
    with pytest.raises(ValueError, match=message):
        generate(reference_model(TINY, 0), [prompt], max_new_tokens=1)
