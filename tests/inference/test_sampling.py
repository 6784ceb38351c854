"""Sampling: the shares of each row's settings, its independence of other rows, and its random numbers."""

import re

import pytest
import torch

from kernels.sampling.uniform import uniform
from megatron_tn.inference.sampler import Plan, Sampler, SamplingRows, sample
from megatron_tn.inference.uniform import stream_key

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
    ("given", "problem"),
    [
        ({"temperature": -1}, "temperature=-1 must be at least 0"),
        ({"top_k": -1}, "top_k=-1 must be at least 0"),
        ({"top_p": 0}, "top_p=0 must be above 0"),
        ({"repetition_penalty": 0}, "repetition_penalty=0 must be above 0"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty=1e-40 must be above 0, and from 1e-30 to 1e+30"),
        ({"top_k": 1.5}, "top_k=1.5 must be at least 0, and whole"),
    ],
    ids=["temperature", "top_k", "top_p", "repetition_penalty", "penalty that fp32 rounds to 0", "half a token"],
)
def test_settings_that_make_no_sense_are_named(given, problem):
    with pytest.raises(ValueError, match=re.escape(problem)):
        Sampler(**given)


def test_a_row_is_drawn_as_if_it_were_alone():
    """The plan of a batch orders more candidates than a row needs, and the row's id is the same."""
    samplers = [
        Sampler(1.0),
        Sampler(0.9, top_k=3),
        Sampler(1.0, top_k=70),
        Sampler(1.0, top_p=0.7),
        Sampler(0.0),
        Sampler(1.1, top_k=9, top_p=0.8, repetition_penalty=1.2),
    ]
    draw = torch.Generator().manual_seed(0)
    logits, positions = 3 * torch.randn(50, len(samplers), 200, generator=draw), torch.arange(len(samplers))

    def rows_of(*chosen: int) -> SamplingRows:
        rows = SamplingRows(len(chosen), 200, torch.device("cpu"))
        for row, index in enumerate(chosen):
            rows.set(row, samplers[index], stream_key(7, index), {1, 2, 3})
        return rows

    together, everyone = rows_of(*range(len(samplers))), Plan.of(samplers, 200)
    assert everyone == Plan(random=True, candidates=200, nucleus=True, penalty=True)
    wanted = torch.stack([sample(each, together, positions, everyone) for each in logits])
    for index, sampler in enumerate(samplers):
        rows, plan = rows_of(index), Plan.of([sampler], 200)
        one = slice(index, index + 1)
        found = torch.cat([sample(each[one], rows, positions[one], plan) for each in logits])
        assert found.tolist() == wanted[:, index].tolist()


def test_random_numbers_are_splitmix64s():
    """Outputs 1 to 4 of the published generator with seed 1234567; and no two requests share a stream."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    found = uniform(torch.full([4], 1234567), torch.arange(1, 5))
    assert found.tolist() == [(value >> 12) / 2**52 for value in published]
    many = uniform(torch.tensor([stream_key(s, r) for s in range(40) for r in range(50)]), torch.zeros(2000).long())
    assert len(many.unique()) == 2000
    assert (many.mean() - 0.5).abs() < 0.02
    assert (many.sort().values - torch.arange(2000) / 2000).abs().max() < 0.04  # Kolmogorov and Smirnov
