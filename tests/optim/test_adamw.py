"""Which AdamW is taken, and that apex's, which keeps its step per group, is saved and resumed like torch's."""

from __future__ import annotations

import dataclasses
import sys
import types

import pytest
import torch

from megatron_tn.checkpoint.load import load_checkpoint
from megatron_tn.checkpoint.save import save_checkpoint
from megatron_tn.config import ConfigError, OptimConfig, to_mapping
from megatron_tn.engine.build import build_engine, initialize_engine
from megatron_tn.optim.groups import build_adamw
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.training.step import train_step
from tests.helpers.models import Rows, random_batch, tiny_config

CPU = torch.device("cpu")


class FusedAdam(torch.optim.Optimizer):
    """The interface of apex.optimizers.FusedAdam in plain torch: moments per parameter, the step per group."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True, weight_decay=0.0):
        assert adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            first, second = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                state["exp_avg"].lerp_(p.grad, 1 - first)
                state["exp_avg_sq"].mul_(second).addcmul_(p.grad, p.grad, value=1 - second)
                unbiased = state["exp_avg_sq"] / (1 - second ** group["step"])
                p.addcdiv_(
                    state["exp_avg"], unbiased.sqrt() + group["eps"], value=-group["lr"] / (1 - first ** group["step"])
                )


@pytest.fixture
def apex(monkeypatch):
    package, optimizers = types.ModuleType("apex"), types.ModuleType("apex.optimizers")
    optimizers.FusedAdam = FusedAdam
    monkeypatch.setitem(sys.modules, "apex", package)
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)


def groups() -> list[dict]:
    return [{"params": [torch.nn.Parameter(torch.zeros(2, 2))], "weight_decay": 0.0}]


def test_torchs_fused_adamw_is_the_default_on_a_cpu(apex):
    chosen = build_adamw(groups(), OptimConfig())
    assert isinstance(chosen, torch.optim.AdamW)
    assert chosen.defaults["fused"]


def test_apex_is_taken_when_it_is_asked_for(apex):
    assert isinstance(build_adamw(groups(), OptimConfig(fused="apex")), FusedAdam)


def test_apex_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(ConfigError, match="NVIDIA's apex is not installed"):
        build_adamw(groups(), OptimConfig(fused="apex"))


def engine_with(fused: str):
    config = tiny_config(optim=OptimConfig(lr=1e-2, fused=fused))
    engine = build_engine(config, ParallelContext(), CPU)
    initialize_engine(engine, seed=3)
    return config, engine


def steps(engine, numbers) -> list[float]:
    rows = [Rows(*random_batch(2, 24, seed=number)) for number in numbers]
    return [train_step(engine, [row], 1e-2, CPU).loss for row in rows]


def test_apex_trains_like_torch(apex):
    assert steps(engine_with("apex")[1], range(6)) == pytest.approx(steps(engine_with("torch")[1], range(6)), rel=1e-5)


@pytest.mark.parametrize("fused", ["apex", "torch"])
def test_an_interrupted_run_goes_on_bitwise(apex, tmp_path, fused):
    config, whole = engine_with(fused)
    expected = steps(whole, range(6))
    _, engine = engine_with(fused)
    steps(engine, range(3))
    saved = save_checkpoint(engine, tmp_path, step=3, optimizer_step=3, config=to_mapping(config), training={})
    _, resumed = engine_with(fused)
    load_checkpoint(resumed, saved)
    assert steps(resumed, range(3, 6)) == expected[3:]


def test_apex_does_not_go_with_deepspeeds_stage_0():
    config = tiny_config(optim=OptimConfig(fused="apex"))
    config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, name="deepspeed", zero_stage=0))
    assert any("optim.fused=apex" in problem for problem in config.problems(1))
