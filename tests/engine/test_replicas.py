"""Parameters that tensor-parallel ranks repeat stay bit-equal, and a reduction that is left out is noticed."""

from unittest import mock

import pytest
import torch

from megatron_tn.parallel import products
from megatron_tn.parallel.sequence import TokenSlices
from tests.engine.test_parity import FSDP2, LOCAL, RMSNORM, ZERO, name_of, train
from tests.helpers.ranks import run_shared
from tests.helpers.replicas import assert_replicas_equal, replicated

STEPS = 5  # of which each can make them differ; test_parity trains for twenty
WAYS = pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole", "sequence_parallel"])
ENGINES = {name_of(engine): engine for engine in (LOCAL, *ZERO, FSDP2)}
LAYOUTS = [(2, 1, False), (2, 1, True), (2, 2, False), (2, 2, True), (4, 1, False), (4, 1, True)]  # tp, cp, sequence
# test_parity's twenty steps have every engine with tp 2, and ZeRO 1 with sequence parallelism; here is what is left.
COVERING = [("zero2", LAYOUTS[3]), ("fsdp2", LAYOUTS[1]), ("local", LAYOUTS[5])]
REST = [(name, layout) for name in ENGINES for layout in LAYOUTS if (name, layout) not in COVERING]


def train_without_a_reduction(tp: int, sequence_parallel: bool) -> dict:
    """Where tokens are whole, of what the products send back; where they are shared out, of the weights' gradients."""
    left_out = (
        mock.patch.object(TokenSlices, "repeated", lambda slices, parameter: parameter)
        if sequence_parallel
        else mock.patch.object(products, "start_sum_of_gradients", lambda dx, group, rows: dx)
    )
    with left_out:
        return train(tp, LOCAL, STEPS, RMSNORM, sequence_parallel, rows=4)


@pytest.mark.parametrize(
    ("name", "layout"),
    [*COVERING, *(pytest.param(*case, marks=pytest.mark.full) for case in REST)],
    ids=str,
)
def test_replicated_parameters_stay_bit_equal(name, layout):
    tp, cp, shared = layout
    one_microbatch = tp * cp  # rows
    ranks = run_shared(4, train, tp, ENGINES[name], STEPS, RMSNORM, shared, cp, one_microbatch)
    ranks = [replicated(found) for found in ranks]
    assert_replicas_equal(ranks, tp, RMSNORM.layers)


@WAYS
def test_a_reduction_left_out_makes_them_differ(sequence_parallel):
    one, other = (replicated(found) for found in run_shared(2, train_without_a_reduction, 2, sequence_parallel))
    assert any(not torch.equal(one[place], other[place]) for place in one)
