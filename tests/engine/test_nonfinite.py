"""No step is skipped in silence: a non-finite value on one rank stops the update on all of them."""

import dataclasses
import itertools
from typing import NamedTuple

import pytest
import torch

from megatron_tn.config import EngineConfig, OptimConfig, ParallelConfig
from megatron_tn.engine.build import build_engine, initialize_engine
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.training.state import TrainingState
from megatron_tn.training.step import train_step
from tests.engine.test_parity import FSDP2, LOCAL, ZERO, name_of
from tests.helpers.models import Rows, random_batch, tiny_config
from tests.helpers.ranks import layout, run_shared

BF16 = [EngineConfig(name="deepspeed", zero_stage=stage, precision="bf16") for stage in range(4)]
ENGINES = [LOCAL, *ZERO, *BF16, FSDP2, dataclasses.replace(FSDP2, precision="bf16")]
ADAMW = OptimConfig(lr=1e-2, clip_norm=1.0)
MUON = dataclasses.replace(ADAMW, name="muon")
CASES = [(ADAMW, engine) for engine in ENGINES] + [(MUON, engine) for engine in (LOCAL, BF16[1], BF16[3], FSDP2)]
CASES += [(ADAMW, dataclasses.replace(engine, products="fp8")) for engine in (LOCAL, BF16[1], FSDP2)]


def poison(module, inputs, output: torch.Tensor) -> None:
    output.register_hook(lambda gradient: gradient * float("nan"))


class Found(NamedTuple):
    """Of three steps, the second of which has a NaN in one rank's gradients: which were applied, and whether masters
    and optimizer state were unchanged by the second and by the third."""

    applied: list[bool]
    unchanged: list[bool]
    state: TrainingState


def poisoned_steps(tp: int, cp: int) -> dict[str, Found]:
    """By each optimizer and engine."""
    context = layout(tp, cp)
    return {
        f"{optim.name} {name_of(engine)} {engine.precision} {engine.products}": poisoned_step(optim, engine, context)
        for optim, engine in CASES
    }


def poisoned_step(optim: OptimConfig, engine_config: EngineConfig, context: ParallelContext) -> Found:
    parallel = ParallelConfig(tp=context.tp.size, cp=context.cp.size)
    config = tiny_config(optim=optim, engine=engine_config, parallel=parallel)
    engine = build_engine(config, context, torch.device("cpu"))
    initialize_engine(engine, 3)
    state = TrainingState()
    tokens, targets = random_batch(2, 16)
    reports, masters = [], []
    for step in range(3):
        if step == 1 and context.rank == 1:
            # As a flipped bit would: one rank's gradients become NaN during the backward pass.
            hook = engine.model.model.layers[1].channel_mixer.register_forward_hook(poison)
        reports.append(train_step(engine, [Rows(tokens[:1], targets[:1])], 1e-2, torch.device("cpu")))
        state.count(reports[-1], samples=1)
        held = [owned.values for owned in engine.owned_ranges()]
        masters.append(torch.cat([values[kind].clone() for values in held for kind in values]))
        if step == 1 and context.rank == 1:
            hook.remove()
    unchanged = [torch.equal(before, after) for before, after in itertools.pairwise(masters)]
    return Found([report.applied for report in reports], unchanged, state)


@pytest.mark.parametrize(("tp", "cp"), [(1, 1), (2, 1), (1, 2)], ids=str)
def test_one_bad_rank_stops_the_update_everywhere(tp, cp):
    for of_engines in run_shared(2, poisoned_steps, tp, cp):
        assert len(of_engines) == len(CASES)
        for name, found in of_engines.items():
            assert found.applied == [True, False, True], name
            assert found.unchanged == [True, False], name
            assert (found.state.step, found.state.optimizer_step) == (3, 2), name
