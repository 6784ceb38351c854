"""The plan's figure beside what a GPU's allocator took: `make test-gpu`."""

import dataclasses
import gc

import pytest
import torch

from megatron_tn.config import DataConfig, EngineConfig, ModelConfig, TrainConfig, from_mapping
from megatron_tn.engine.build import build_engine, initialize_engine
from megatron_tn.model.registry import parameter_count
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.planning.estimate import GIB, plan_memory
from tests.helpers.ranks import run_ranks, this_device
from tests.helpers.sizes import compose_model

pytestmark = pytest.mark.gpu
LAYERS, ROWS, LENGTH = 24, 8, 2048


def planned_config(engine: EngineConfig, size: str = "385m") -> TrainConfig:
    return dataclasses.replace(
        TrainConfig(),
        model=from_mapping(ModelConfig, compose_model(size) | {"layers": LAYERS}),
        engine=engine,
        data=DataConfig(sequence_length=LENGTH, global_batch=2 * ROWS, micro_batch=ROWS),
    )


def reserved(config: TrainConfig) -> int:
    """Two steps of two microbatches each, from nothing."""
    device = this_device()
    engine = build_engine(config, ParallelContext.create(), device)
    initialize_engine(engine, 0)
    tokens = torch.randint(3, config.model.vocab_size, (ROWS, LENGTH), device=device)
    scale = torch.tensor(1 / (2 * tokens.numel()), device=device)
    for _ in range(2):
        for last in (False, True):
            engine.forward_backward(tokens, tokens, None, scale=scale, last=last)
        engine.step(1e-4)
    torch.cuda.synchronize()
    print({"allocated": round(torch.cuda.max_memory_allocated() / GIB, 2)}, flush=True)
    gc.collect()
    return torch.cuda.max_memory_reserved()


def held_and_living(config: TrainConfig) -> tuple[int, int]:
    """(bytes that the allocator holds, bytes of what lives in them), once an engine is built."""
    engine = build_engine(config, ParallelContext.create(), this_device())
    assert torch.cuda.max_memory_reserved() == torch.cuda.memory_reserved()
    sizes = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    del engine
    return sizes


CASES = {
    f"{name}-{recompute}": planned_config(EngineConfig(**kind, recompute=recompute))
    for name, kind in {
        "local": {"name": "local"},
        "zero1": {"zero_stage": 1},
        "zero1 graph": {"zero_stage": 1, "cuda_graph": True},
        "zero1 bf16": {"zero_stage": 1, "gradient_dtype": "bf16"},
        "zero2": {"zero_stage": 2},
    }.items()
    for recompute in ("none", "full")
}
CASES |= {
    f"transformer {name}": planned_config(engine, "transformer_385m")
    for name, engine in {
        "local": EngineConfig(name="local"),
        "zero1 graph": EngineConfig(cuda_graph=True),
        "selective": EngineConfig(recompute="selective"),
    }.items()
}


@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_within_a_tenth_of_the_measured_peak(name):
    config = CASES[name]
    plan = plan_memory(config, 1)
    (measured,) = run_ranks(1, reserved, config, device="cuda")
    kinds = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in plan.kinds.items())
    print(f"\n{name}: {plan.reserved / GIB:.2f} GiB predicted, {measured / GIB:.2f} measured ({kinds})")
    assert plan.reserved == pytest.approx(measured, rel=0.10)


@pytest.mark.parametrize("stage", range(4))
def test_building_hands_back_what_it_held_for_a_while(stage):
    """DeepSpeed copies the parameters twice at stage 1."""
    config = planned_config(EngineConfig(zero_stage=stage))
    ((held, living),) = run_ranks(1, held_and_living, config, device="cuda")
    copy = 2 * parameter_count(config.model)
    print(f"{held >> 20} MiB held, {living >> 20} live, a copy of the parameters is {copy >> 20}")
    assert living > copy
    assert held - living < copy / 2
