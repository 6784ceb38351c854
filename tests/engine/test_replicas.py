"""Parameters that tensor-parallel ranks repeat stay bit-equal, and a reduction that is left out is noticed."""

from __future__ import annotations

import pytest
import torch

from megatron_tn.parallel import products
from megatron_tn.parallel.sequence import TokenSlices
from tests.engine.test_parity import LOCAL, RMSNORM, ZERO, train
from tests.helpers.ranks import run_ranks

STEPS = 20


def replicated(found: dict) -> dict[str, torch.Tensor]:
    """Norm weights before the mixers and at the end: every rank holds these whole."""
    return {name: value for name, value in found["whole"].items() if name.endswith(("_norm.weight",))}


def train_without_a_reduction(tp: int, sequence_parallel: bool) -> dict:
    """Where tokens are whole, of what the products send back; where they are shared out, of the weights' gradients."""
    if sequence_parallel:
        TokenSlices.repeated = lambda slices, parameter: parameter
    else:
        products.start_sum_of_gradients = lambda dx, group, rows: dx
    return train(tp, LOCAL, STEPS, RMSNORM, sequence_parallel)


WAYS = pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole", "sequence_parallel"])


@WAYS
def test_replicated_parameters_are_bit_equal_after_twenty_steps(sequence_parallel):
    for engine in (ZERO[1],) if sequence_parallel else (LOCAL, ZERO[1]):
        ranks = run_ranks(4, train, 2, engine, STEPS, RMSNORM, sequence_parallel)
        first = replicated(ranks[0])
        assert len(first) == 2 * RMSNORM.layers + 1
        for other in ranks[1:]:
            for name, value in replicated(other).items():
                assert torch.equal(value, first[name]), name
        assert not torch.equal(first["model.final_norm.weight"], torch.ones(RMSNORM.embed_dim))


@WAYS
def test_a_reduction_left_out_makes_them_differ(sequence_parallel):
    one, other = (replicated(found) for found in run_ranks(2, train_without_a_reduction, 2, sequence_parallel))
    assert any(not torch.equal(one[name], other[name]) for name in one)
