"""No step is skipped in silence (promise 7): a non-finite value on one rank stops the update on all of them."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from megatron_tn.config import EngineConfig, ParallelConfig
from megatron_tn.engine.build import build_engine, initialize_engine
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.training.state import TrainingState
from megatron_tn.training.step import train_step
from tests.engine.test_parity import FSDP2, LOCAL, ZERO, name_of
from tests.helpers.models import Rows, random_batch, tiny_config
from tests.helpers.ranks import run_ranks

BF16 = [EngineConfig(name="deepspeed", zero_stage=stage, precision="bf16") for stage in range(4)]
FSDP2S = [FSDP2, dataclasses.replace(FSDP2, precision="bf16")]


def poison(module, inputs, output: torch.Tensor) -> None:
    output.register_hook(lambda gradient: gradient * float("nan"))


def poisoned_step(tp: int, cp: int, engine_config: EngineConfig) -> tuple:
    context = ParallelContext.create(tp, cp)
    engine = build_engine(
        tiny_config(engine=engine_config, parallel=ParallelConfig(tp=tp, cp=cp)), context, torch.device("cpu")
    )
    initialize_engine(engine, 3)
    state = TrainingState()
    tokens, targets = random_batch(2, 16)
    reports, masters = [], []
    for step in range(3):
        if step == 1 and context.rank == 1:
            # A bad cosmic ray on one rank only: its gradients become NaN on the way back.
            hook = engine.model.model.layers[1].channel_mixer.register_forward_hook(poison)
        reports.append(train_step(engine, [Rows(tokens[:1], targets[:1])], 1e-2, torch.device("cpu")))
        state.count(reports[-1], samples=1)
        masters.append(torch.cat([owned.values["param"].clone() for owned in engine.owned_ranges()]))
        if step == 1 and context.rank == 1:
            hook.remove()
    return [r.applied for r in reports], [torch.equal(a, b) for a, b in itertools.pairwise(masters)], state


@pytest.mark.parametrize("engine", [LOCAL, *ZERO, *BF16, *FSDP2S], ids=lambda e: f"{name_of(e)}-{e.precision}")
@pytest.mark.parametrize(("tp", "cp"), [(1, 1), (2, 1), (1, 2)], ids=str)
def test_one_bad_rank_stops_the_update_everywhere(engine, tp, cp):
    for applied, unchanged, state in run_ranks(2, poisoned_step, tp, cp, engine):
        assert applied == [True, False, True]
        assert unchanged == [True, False]
        assert (state.step, state.optimizer_step) == (3, 2)
