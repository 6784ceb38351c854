"""The layout: who is where, and sizes that do not fit."""

from __future__ import annotations

import pytest

from megatron_tn.parallel.context import ParallelContext
from tests.helpers.ranks import run_ranks


def place(tp: int, cp: int) -> tuple:
    context = ParallelContext.create(tp=tp, cp=cp)
    axes = (context.dp, context.cp, context.tp, context.data)
    return context.rank, [(axis.rank, axis.size) for axis in axes]


def test_tensor_parallel_is_fastest():
    found = run_ranks(4, place, 2, 1)
    assert [rank for rank, _ in found] == [0, 1, 2, 3]
    assert [axes[2] for _, axes in found] == [(0, 2), (1, 2), (0, 2), (1, 2)]
    assert [axes[0] for _, axes in found] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert [axes[3] for _, axes in found] == [(0, 2), (0, 2), (1, 2), (1, 2)]


def test_context_parallel_ranks_share_parameters_with_data_parallel_ones():
    found = run_ranks(4, place, 1, 2)
    assert [axes[1] for _, axes in found] == [(0, 2), (1, 2), (0, 2), (1, 2)]
    assert [axes[3] for _, axes in found] == [(n, 4) for n in range(4)]


def test_one_process_needs_no_process_group():
    context = ParallelContext.create()
    assert (context.world_size, context.rank, context.is_first) == (1, 0, True)


def test_sizes_that_do_not_fit_the_world_are_named():
    with pytest.raises(ValueError, match="world size 1 is not a multiple of tp=2 x cp=1 = 2"):
        ParallelContext.create(tp=2)
