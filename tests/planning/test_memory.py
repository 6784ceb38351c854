"""Memory of the model's state: by hand, and as the engines really hold it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_tn.config import EngineConfig, ParallelConfig, TrainConfig, from_mapping
from megatron_tn.engine.build import build_engine
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.plan import main
from megatron_tn.planning.memory import GIB, state_bytes
from tests.engine.test_parity import ZERO
from tests.helpers.models import TINY, tiny_config
from tests.helpers.ranks import run_ranks
from tests.helpers.sizes import compose_model
from tests.helpers.training import call

BF16 = [EngineConfig(name="deepspeed", zero_stage=stage, precision="bf16") for stage in range(4)]


def test_seven_billion_on_eight_gpus_by_hand():
    model = from_mapping(type(TINY), compose_model("7b"))
    config = dataclasses.replace(TrainConfig(), model=model, parallel=ParallelConfig(tp=2))
    found = state_bytes(config, world_size=8)
    local = 6_836_719_616 / 2
    assert found == {"parameters": local * 2, "gradients": local * 4, "masters": local, "moments": local * 2}


def held(tp: int, engine_config: EngineConfig) -> tuple[int, int]:
    """Bytes of masters that are tensors of their own, and of moments, on this rank."""
    context = ParallelContext.create(tp)
    config = tiny_config(engine=engine_config, parallel=ParallelConfig(tp=tp))
    engine = build_engine(config, context, torch.device("cpu"))
    ranges = engine.owned_ranges()
    sizes = [sum(r.values[kind].numel() * 4 for r in ranges) for kind in ("param", "exp_avg", "exp_avg_sq")]
    return sizes[0], sizes[1] + sizes[2]


@pytest.mark.parametrize("engine", [*ZERO[1:], *BF16], ids=lambda e: f"zero{e.zero_stage}-{e.precision}")
def test_engines_hold_what_is_planned(engine):
    config = tiny_config(engine=engine, model=TINY)
    planned = state_bytes(config, world_size=2)
    for masters, moments in run_ranks(2, held, 1, engine):
        assert moments == pytest.approx(planned["moments"], rel=0.02)
        if planned["masters"]:
            assert masters == pytest.approx(planned["masters"], rel=0.02)


def test_the_command_line_says_when_it_does_not_fit(capsys):
    assert call(main, "model=7b", "parallel.tp=8", "engine=zero1", "cluster=a100_80g", "nodes=16") == 0
    assert "6,836,719,616 parameters" in capsys.readouterr().out
    assert call(main, "model=175b", "parallel.tp=8", "engine=zero1", "cluster=a100_80g", "nodes=1") == 2
    assert "GiB a rank, but cluster.gpu_memory_gib=79.1" in capsys.readouterr().err


def test_zero_divides_over_data_parallel_ranks_alone():
    config = tiny_config(engine=ZERO[3], parallel=ParallelConfig(tp=2))
    one, four = (sum(state_bytes(config, world).values()) for world in (2, 8))
    assert one == pytest.approx(4 * four, rel=1e-3)
    assert one < GIB
