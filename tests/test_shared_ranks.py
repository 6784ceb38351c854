"""Ranks that many tests share give what ranks of their own give, and are replaced after a failure."""

import os

import pytest
import torch
import torch.distributed as dist

from tests.engine.test_parity import FSDP2, LOCAL, ZERO, train, train_each
from tests.helpers.ranks import layout, run_ranks, run_shared


def identity() -> tuple[int, int, float]:
    return os.getpid(), id(layout(2).tp.group), torch.rand(()).item()


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("of rank 1")
    dist.barrier()  # for ever


def test_engines_before_it_change_no_engine():
    run_shared(2, train_each, 2, [FSDP2, ZERO[1], LOCAL], 2)
    for engine, tp in ((ZERO[3], 1), (ZERO[1], 2)):
        for alone, shared in zip(*(run(2, train, tp, engine, 2) for run in (run_ranks, run_shared)), strict=True):
            assert alone["losses"] == shared["losses"]
            assert all(torch.equal(alone["owned"][place], shared["owned"][place]) for place in alone["owned"])


def test_processes_and_groups_last_until_a_failure():
    first = run_shared(2, identity)
    assert run_shared(2, identity) == first
    with pytest.raises(AssertionError, match=r"rank 1 of 2:\n(.|\n)*ValueError: of rank 1"):
        run_shared(2, fail_on_rank_1)
    assert {pid for pid, *_ in run_shared(2, identity)}.isdisjoint({pid for pid, *_ in first})
