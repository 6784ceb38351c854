"""Parameters that tensor-parallel ranks repeat stay bit-equal, and a reduction that is left out is noticed."""

from __future__ import annotations

import torch

from megatron_tn.model import attention, sglu
from tests.engine.test_parity import LOCAL, RMSNORM, ZERO, train
from tests.helpers.ranks import run_ranks

STEPS = 20


def replicated(found: dict) -> dict[str, torch.Tensor]:
    """Norm weights before the mixers and at the end: every rank holds these whole."""
    return {name: value for name, value in found["whole"].items() if name.endswith(("_norm.weight",))}


def train_without_a_reduction(tp: int) -> dict:
    attention.copy_to = sglu.copy_to = lambda x, axis: x
    return train(tp, LOCAL, STEPS)


def test_replicated_parameters_are_bit_equal_after_twenty_steps():
    for engine in (LOCAL, ZERO[1]):
        ranks = run_ranks(4, train, 2, engine, STEPS)
        first = replicated(ranks[0])
        assert len(first) == 2 * RMSNORM.layers + 1
        for other in ranks[1:]:
            for name, value in replicated(other).items():
                assert torch.equal(value, first[name]), name
        assert not torch.equal(first["model.final_norm.weight"], torch.ones(RMSNORM.embed_dim))


def test_a_reduction_left_out_makes_them_differ():
    one, other = (replicated(found) for found in run_ranks(2, train_without_a_reduction, 2))
    assert any(not torch.equal(one[name], other[name]) for name in one)
