"""Every layout equals one process (promise 3): each gradient against fp64, and training itself against training."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from megatron_tn.config import DataConfig, EngineConfig, OptimConfig, ParallelConfig
from megatron_tn.engine.build import build_engine, initialize_engine
from megatron_tn.optim.schedule import learning_rate
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.training.step import train_step
from tests.helpers.models import TINY, Rows, random_batch, reference_gradients, relative_errors, tiny_config
from tests.helpers.ranks import run_ranks, this_device

SEED, LENGTH, BATCH = 7, 24, 12
LOCAL = EngineConfig(name="local", precision="fp32")
ZERO = [EngineConfig(name="deepspeed", zero_stage=stage, precision="fp32") for stage in range(4)]
FSDP2 = EngineConfig(name="fsdp2", precision="fp32")
RMSNORM = dataclasses.replace(TINY, norm="rmsnorm")


def name_of(engine: EngineConfig) -> str:
    return f"zero{engine.zero_stage}" if engine.name == "deepspeed" else engine.name


def gradients_of(tp: int, cases: list[tuple[EngineConfig, int, str]]) -> dict[Any, Any]:
    """(engine, accumulation, norm) -> (gradients, gradient norm), of one step of the same global batch."""
    context = ParallelContext.create(tp)
    tokens, targets = (part.to(this_device()) for part in random_batch(BATCH, LENGTH))
    share = BATCH // context.data.size
    mine = slice(context.data.rank * share, (context.data.rank + 1) * share)
    found = {}
    for engine_config, accumulation, norm in cases:
        micro = share // accumulation
        config = tiny_config(
            model=dataclasses.replace(TINY, norm=norm),
            engine=engine_config,
            parallel=ParallelConfig(tp=tp),
            data=DataConfig(sequence_length=LENGTH, global_batch=BATCH, micro_batch=micro),
        )
        engine = build_engine(config, context, this_device())
        initialize_engine(engine, SEED)
        scale = 1 / (targets != -100).sum()
        for index, (ids, wanted) in enumerate(zip(tokens[mine].split(micro), targets[mine].split(micro), strict=True)):
            engine.forward_backward(ids, wanted, None, scale=scale, last=index == accumulation - 1)
        gradients = engine.named_logical_gradients()
        gradients = {name: gradient.cpu() for name, gradient in gradients.items()}
        found[name_of(engine_config), accumulation, norm] = gradients, engine.step(1e-3).grad_norm
    return found


def check_gradients(world: int, tp: int, cases: list[tuple[EngineConfig, int, str]], device: str = "cpu") -> None:
    tokens, targets = random_batch(BATCH, LENGTH)
    wanted, bound = {}, {}
    for norm in {norm for *_, norm in cases}:
        config = dataclasses.replace(TINY, norm=norm)
        _, wanted[norm] = reference_gradients(config, SEED, tokens, targets)
        _, single = reference_gradients(config, SEED, tokens, targets, torch.float32)
        # 1e-5, or twice the error of one process in the same precision where that is larger.
        bound[norm] = {name: max(1e-5, 2 * error) for name, error in relative_errors(single, wanted[norm]).items()}
    for rank, found in enumerate(run_ranks(world, gradients_of, tp, cases, device=device)):
        for case, (gradients, grad_norm) in found.items():
            reference = wanted[case[-1]]
            for parameter, error in relative_errors(gradients, reference).items():
                assert error <= bound[case[-1]][parameter], (rank, case, parameter)
            total = torch.stack([value.norm() for value in reference.values()]).norm().item()
            assert grad_norm == pytest.approx(total, rel=1e-6), (rank, case)


@pytest.mark.parametrize(("world", "tp"), [(2, 1), (2, 2), (4, 2)], ids=lambda n: str(n))
def test_gradients_equal_one_fp64_process(world, tp):
    covering = [(engine, 1 + 2 * (index % 2), TINY.norm) for index, engine in enumerate([LOCAL, *ZERO, FSDP2])]
    check_gradients(world, tp, [*covering, (ZERO[1], 1, "rmsnorm"), (ZERO[2], 3, "rmsnorm")])


@pytest.mark.full
@pytest.mark.parametrize(("world", "tp"), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)], ids=lambda n: str(n))
def test_gradients_equal_one_fp64_process_in_every_layout(world, tp):
    engines = [LOCAL, *ZERO, FSDP2]
    norms = ("simplermsnorm", "rmsnorm")
    check_gradients(world, tp, [(engine, n, norm) for engine in engines for n in (1, 3) for norm in norms])


def train(tp: int, engine_config: EngineConfig, steps: int, model=RMSNORM) -> dict[str, Any]:
    """Losses, gradient norms and, after the last step, this rank's parameters."""
    context = ParallelContext.create(tp)
    config = tiny_config(
        model=model,
        engine=engine_config,
        parallel=ParallelConfig(tp=tp),
        data=DataConfig(sequence_length=LENGTH, global_batch=4, micro_batch=1),
        optim=OptimConfig(lr=1e-2, clip_norm=0.5),
    )
    engine = build_engine(config, context, this_device())
    initialize_engine(engine, SEED)
    share = 4 // context.data.size
    reports = []
    for step in range(steps):
        tokens, targets = random_batch(4, LENGTH, seed=step % 4)
        mine = range(context.data.rank * share, (context.data.rank + 1) * share)
        batches = [Rows(tokens[i : i + 1], targets[i : i + 1]) for i in mine]
        lr = learning_rate(step, config.optim, config.schedule)
        reports.append(train_step(engine, batches, lr, this_device()))
    owned = {(r.name, r.start): r.values["param"].clone().cpu() for r in engine.owned_ranges()}
    whole = {name: p.detach().clone().cpu() for name, p in engine.model.named_parameters()}
    return {
        "losses": [r.loss for r in reports],
        "norms": [r.grad_norm for r in reports],
        "whole": whole,
        "owned": owned,
    }


@pytest.mark.parametrize("engine", [LOCAL, *ZERO, FSDP2], ids=name_of)
def test_twenty_steps_of_training_equal_one_process(engine):
    alone = run_ranks(1, train, 1, LOCAL, 20)[0]
    for found in run_ranks(4, train, 2, engine, 20):
        assert found["losses"] == pytest.approx(alone["losses"], rel=2e-4)
        assert found["norms"] == pytest.approx(alone["norms"], rel=2e-3)
    assert alone["losses"][-1] < alone["losses"][0] - 0.1


def test_bf16_trains_with_fp32_masters():
    """Updates far below a bf16 step must add up in the masters."""
    for stage in range(4):
        engine = EngineConfig(name="deepspeed", zero_stage=stage, precision="bf16")
        found = run_ranks(2, train, 1, engine, 8, TINY)[0]
        assert found["losses"][-1] < found["losses"][0]
        masters = torch.cat(list(found["owned"].values()))
        assert masters.dtype == torch.float32
        assert not torch.equal(masters, masters.bfloat16().float())
