"""A world that is left takes its engine's memory with it: a sweep trains one model after another in a process."""

import gc
import os

import torch
import torch.distributed as dist

from megatron_tn.config import EngineConfig
from megatron_tn.parallel.world import join_world, leave_world
from tests.engine.test_parity import FSDP2, LOCAL, ZERO, name_of, train
from tests.helpers.ranks import run_ranks

BF16 = [EngineConfig(name="deepspeed", zero_stage=stage) for stage in (1, 3)]  # what they wrap differs from fp32's
ENGINES = [LOCAL, *ZERO, *BF16, FSDP2]


def left_after_each() -> dict[str, int]:
    """Bytes of storage that tensors hold in the world after an engine's, beyond those before it."""
    found = {}
    for engine in ENGINES:
        gc.collect()
        before = _bytes_alive()
        for _ in range(2):
            train(1, engine, steps=1)
        assert len(dist.distributed_c10d._world.pg_map) <= 2  # the world, and this rank alone: none for each engine
        leave_world()
        os.environ.pop("RANK", None)
        join_world(60)
        found[f"{name_of(engine)} {engine.precision}"] = _bytes_alive() - before
    return found


def _bytes_alive() -> int:
    tensors = [found for found in gc.get_objects() if isinstance(found, torch.Tensor) and not found.is_meta]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def test_nothing_of_an_engine_outlives_its_world():
    (left,) = run_ranks(1, left_after_each)
    assert len(left) == len(ENGINES)
    for name, size in left.items():
        assert size < 100, name  # a model has 400 thousand
