"""A world that is left takes its engine's memory with it: a sweep trains one model after another in a process."""

from __future__ import annotations

import gc
import os

import pytest
import torch

from megatron_tn.config import EngineConfig
from megatron_tn.parallel.world import join_world, leave_world
from tests.engine.test_parity import FSDP2, LOCAL, ZERO, name_of, train
from tests.helpers.ranks import run_ranks

BF16 = [EngineConfig(name="deepspeed", zero_stage=stage) for stage in (1, 3)]  # what they wrap differs from fp32's


def left_after(engine: EngineConfig) -> int:
    """Bytes of storage that tensors hold in the next world, beyond those before the first."""
    gc.collect()
    before = _bytes_alive()
    train(1, engine, steps=2)
    leave_world()
    del os.environ["RANK"]
    join_world(60)
    return _bytes_alive() - before


def _bytes_alive() -> int:
    tensors = [found for found in gc.get_objects() if isinstance(found, torch.Tensor) and not found.is_meta]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("engine", [LOCAL, *ZERO, *BF16, FSDP2], ids=lambda e: f"{name_of(e)} {e.precision}")
def test_nothing_of_an_engine_outlives_its_world(engine):
    assert run_ranks(1, left_after, engine)[0] < 100  # a model has 400 thousand
