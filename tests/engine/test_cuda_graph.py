"""A microbatch's passes in one replayed CUDA graph: the same numbers, whatever is added up, and whoever looks on."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_tn.config import DataConfig, EngineConfig, ParallelConfig
from megatron_tn.engine.build import build_engine, initialize_engine
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.training.diagnose import find_nonfinite
from megatron_tn.training.step import train_step
from tests.helpers.models import Rows, random_batch, tiny_config
from tests.helpers.ranks import run_ranks, this_device

ENGINES = [
    EngineConfig(name="local", precision="bf16", reduce_bucket_elements=3000),  # several buckets
    EngineConfig(name="deepspeed", zero_stage=1, reduce_bucket_elements=3000),
]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def run(
    engine_config: EngineConfig, accumulation: int, packed: bool, tp: int = 1
) -> tuple[list[float], list[torch.Tensor]]:
    """Losses and gradient norms of six steps, and the masters after them; one step's passes are looked at.

    tp: with sequence parallelism; other ranks are data-parallel, and see the same batches.
    """
    length = 48
    data = DataConfig(sequence_length=length, global_batch=2 * accumulation, micro_batch=1 if packed else 2)
    context = ParallelContext.create(tp, sequence_parallel=tp > 1)
    parallel = ParallelConfig(tp=tp, sequence_parallel=tp > 1)
    engine = build_engine(tiny_config(engine=engine_config, data=data, parallel=parallel), context, this_device())
    initialize_engine(engine, 3)
    bounds = torch.tensor([0, 7, 20, length, length], dtype=torch.int32, device=this_device()) if packed else None
    found = []
    for step in range(6):
        tokens, targets = (part.to(this_device()) for part in random_batch(2 * accumulation, length, seed=step))
        rows = 1 if packed else 2
        batches = [
            Rows(ids, wanted, bounds) for ids, wanted in zip(tokens.split(rows), targets.split(rows), strict=True)
        ]
        report = train_step(engine, batches, 1e-2, this_device())
        found += [report.loss, report.grad_norm]
        if step == 3:
            assert find_nonfinite(engine, batches, this_device()) == []
    return found, [owned.values["param"].cpu().clone() for owned in engine.owned_ranges()]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
@pytest.mark.parametrize(
    ("accumulation", "packed"), [(1, False), (3, False), (1, True)], ids=["one", "three", "packed"]
)
def test_replayed_passes_are_the_eager_ones(engine, accumulation, packed, device):
    captured = dataclasses.replace(engine, cuda_graph=True)
    ((wanted, masters),) = run_ranks(1, run, engine, accumulation, packed, device=device)
    ((found, others),) = run_ranks(1, run, captured, accumulation, packed, device=device)
    assert found == wanted
    for one, other in zip(masters, others, strict=True):
        assert torch.equal(one, other)
    assert len(set(found)) == len(found)  # every step was another's


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu(2))])
def test_replayed_collectives_are_the_eager_ones(engine, tp, device):
    captured = dataclasses.replace(engine, cuda_graph=True)
    both = zip(*(run_ranks(2, run, one, 2, False, tp, device=device) for one in (engine, captured)), strict=True)
    for (wanted, masters), (found, others) in both:
        assert found == wanted
        for one, other in zip(masters, others, strict=True):
            assert torch.equal(one, other)


def test_what_does_not_go_with_it_is_refused_by_name():
    def problems(**changes) -> str:
        return "\n".join(tiny_config(engine=EngineConfig(cuda_graph=True, **changes)).problems(1))

    assert problems() == ""
    assert "engine.cuda_graph=true goes with engine=local" in problems(zero_stage=2)
    assert "engine.gradient_dtype=bf16" in problems(gradient_dtype="bf16")
    assert "engine.compile=blocks is not none" in problems(name="local", compile="blocks")
