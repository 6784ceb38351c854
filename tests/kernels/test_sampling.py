"""Sampling: the Triton kernel against plain PyTorch, and plain PyTorch against its probabilities."""

import pytest
import torch

import kernels
from kernels import dispatch
from kernels.sampling.uniform import uniform

SETTINGS = [  # temperature, top_k, top_p, repetition penalty, one row each
    (0.0, 0, 1.0, 1.0),
    (1.0, 0, 1.0, 1.0),
    (0.7, 50, 1.0, 1.0),
    (1.3, 5, 0.5, 1.0),
    (1.0, 0, 0.9, 1.7),
    (0.2, 1, 1.0, 2.0),
]


def draw(logits, position, penalised, backend):
    rows = len(SETTINGS)
    device = logits.device
    columns = [torch.tensor(column, device=device) for column in zip(*SETTINGS, strict=True)]
    seen = (torch.arange(logits.shape[1], device=device) % 7 == 0).repeat(rows, 1)
    given = {"temperature": columns[0].double(), "top_k": columns[1], "top_p": columns[2].double()}
    if penalised:
        given |= {"penalty": columns[3].float(), "seen": seen}
    keys = torch.arange(rows, device=device) * 987_654_321_987 - 5
    with dispatch.backend(backend):
        chosen = kernels.sample_tokens(
            logits, keys, torch.full_like(keys, position), **given, candidates=logits.shape[1], nucleus=True
        )
    return chosen.cpu(), seen.cpu()


def agree(device, dtype, size, positions):
    """Both choose the same, but where a draw falls within fp32's rounding of a border between two tokens."""
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(len(SETTINGS), size, generator=generator)).to(device, dtype)
    logits[:, size // 2 :: 3] = -torch.inf  # tokens that are ruled out
    logits[2, 40:] = -torch.inf  # fewer tokens left than top_k
    logits[3] -= 7.5  # the kth largest logit and bounds below it on both sides of 0
    different = total = 0
    for position in positions:
        for penalised in (False, True):
            got, marked = draw(logits, position, penalised, "triton")
            wanted, wanted_marks = draw(logits, position, penalised, "torch")
            different += int((got != wanted).sum())
            total += len(got)
            if penalised and torch.equal(got, wanted):
                assert torch.equal(marked, wanted_marks)
    assert different <= total / 100


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.full)], ids=str)
def test_the_kernel_draws_the_same_tokens(triton_device, dtype):
    agree(triton_device, dtype, 10_001, range(2))


@pytest.mark.parametrize("value", [-torch.inf, torch.nan])
def test_a_row_without_a_finite_logit_leaves_the_others_as_they_are(value):
    logits = torch.zeros(len(SETTINGS), 9)
    wanted, _ = draw(logits, 1, False, "torch")
    logits[4] = value  # top_p < 1
    found, _ = draw(logits, 1, False, "torch")
    wanted[4] = 0
    assert torch.equal(found, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_kernel_draws_the_same_tokens_of_a_large_vocabulary(cuda, dtype):
    agree(cuda, dtype, 64_000, range(50))


def test_random_numbers_are_spread_evenly():
    u = uniform(torch.tensor([12345]).expand(100_000), torch.arange(100_000))
    assert u.min() >= 0
    assert u.max() < 1
    counts = torch.histc(u, 20, 0, 1)
    assert ((counts - 5000) ** 2 / 5000).sum() < 43.8  # chi-square of 19 degrees of freedom, one in a thousand
