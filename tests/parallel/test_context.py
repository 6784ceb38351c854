"""The layout: who is where, and sizes that do not fit."""

import pytest
import torch.distributed as dist

from megatron_tn.parallel.context import ParallelContext
from tests.helpers.ranks import run_shared


def places(*layouts: dict[str, int]) -> list[dict[str, tuple[int, int]]]:
    """For each layout, (rank, size) on each axis."""
    contexts = [ParallelContext.create(**layout) for layout in layouts]
    assert all(context.rank == dist.get_rank() for context in contexts)
    axes = ("dp", "cp", "tp", "data")
    return [{name: (getattr(at, name).rank, getattr(at, name).size) for name in axes} for at in contexts]


def test_tensor_parallel_is_fastest_then_context_parallel():
    for rank, (tensor, context) in enumerate(run_shared(4, places, {"tp": 2}, {"cp": 2})):
        assert tensor == {"tp": (rank % 2, 2), "cp": (0, 1), "dp": (rank // 2, 2), "data": (rank // 2, 2)}
        # Context-parallel ranks hold the same parameters as data-parallel ones.
        assert context == {"tp": (0, 1), "cp": (rank % 2, 2), "dp": (rank // 2, 2), "data": (rank, 4)}


def test_one_process_needs_no_process_group():
    context = ParallelContext.create()
    assert (context.world_size, context.rank, context.is_first) == (1, 0, True)


def test_sizes_that_do_not_fit_the_world_are_named():
    with pytest.raises(ValueError, match="world size 1 is not a multiple of tp=2 x cp=1 = 2"):
        ParallelContext.create(tp=2)
