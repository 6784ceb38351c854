"""Which AdamW is taken; that each trains like torch's, and is saved and resumed like it."""

import dataclasses
import sys
from typing import get_args, get_type_hints

import pytest
import torch

from megatron_tn.checkpoint.load import load_checkpoint
from megatron_tn.config import ConfigError, EngineConfig, OptimConfig, to_mapping
from megatron_tn.engine.build import build_engine, initialize_engine
from megatron_tn.optim.adamw import ApexAdamW, TorchAdamW, TritonAdamW
from megatron_tn.optim.build import OPTIMIZERS, build_optimizer
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.training.preflight import problems_before_start
from megatron_tn.training.step import train_step
from tests.helpers.apex import FusedAdam
from tests.helpers.checkpoints import save_checkpoint
from tests.helpers.models import Rows, random_batch, tiny_config
from tests.helpers.ranks import layout, run_shared

CPU = torch.device("cpu")


def groups() -> list[dict]:
    return [{"params": [torch.nn.Parameter(torch.zeros(2, 2))], "weight_decay": 0.0}]


def test_every_name_of_the_settings_has_an_optimizer():
    assert set(OPTIMIZERS) == set(get_args(get_type_hints(OptimConfig)["name"]))


def test_torchs_fused_adamw_is_the_default_on_a_cpu(apex):
    chosen = build_optimizer(groups(), OptimConfig())
    assert isinstance(chosen, TorchAdamW)
    assert chosen.inner.defaults["fused"]


def test_this_packages_is_taken_when_it_is_asked_for():
    assert isinstance(build_optimizer(groups(), OptimConfig(fused="triton")), TritonAdamW)


def test_apex_is_taken_when_it_is_asked_for(apex):
    chosen = build_optimizer(groups(), OptimConfig(fused="apex"))
    assert isinstance(chosen, ApexAdamW)
    assert isinstance(chosen.inner, FusedAdam)


def test_apex_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(ConfigError, match="NVIDIA's apex is not installed"):
        build_optimizer(groups(), OptimConfig(fused="apex"))
    config = tiny_config(optim=OptimConfig(fused="apex"))
    assert any("apex is not installed" in problem for problem in problems_before_start(config, 1, None))
    assert problems_before_start(config, 1, None, gpus=True) == []  # a job's machine may have it


def engine_with(fused: str, engine: EngineConfig | None = None, context: ParallelContext | None = None):
    optim = OptimConfig(lr=1e-2, embedding_lr_ratio=0.5, fused=fused)
    config = tiny_config(optim=optim, **({} if engine is None else {"engine": engine}))
    engine = build_engine(config, context or ParallelContext(), CPU)
    initialize_engine(engine, seed=3)
    return config, engine


def steps(engine, numbers) -> list[float]:
    rows = [Rows(*random_batch(2, 24, seed=number)) for number in numbers]
    return [train_step(engine, [row], 1e-2, CPU).loss for row in rows]


ENGINES = {
    f"{name} {precision}": EngineConfig(precision=precision, **settings)
    for precision in ("fp32", "bf16")
    for name, settings in {
        "local": {"name": "local"},
        "zero 0": {"zero_stage": 0},
        "zero 1": {"zero_stage": 1},
        "zero 2": {"zero_stage": 2},
        "zero 3": {"zero_stage": 3},
        "fsdp2": {"name": "fsdp2"},
    }.items()
}


def losses_and_parameters(fused: str, engine_config: EngineConfig) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Of six steps, the third of which has no finite gradient, and the masters after them."""
    engine = engine_with(fused, engine_config, layout())[1]
    found = []
    for step in range(6):
        if step == 2:
            with torch.no_grad():
                healthy = engine.owned_ranges()[0].values["param"].clone()
                engine.owned_ranges()[0].values["param"].fill_(float("inf"))
                engine.refresh(optimizer_step=2)
        report = train_step(engine, [Rows(*random_batch(2, 24, seed=step))], 1e-2, CPU)
        assert report.applied == (step != 2)
        if step == 2:
            with torch.no_grad():
                engine.owned_ranges()[0].values["param"].copy_(healthy)
                engine.refresh(optimizer_step=2)
        else:
            found += [report.loss, report.grad_norm]
    masters = {owned.name: owned.values["param"].clone() for owned in engine.owned_ranges()}
    if engine_config.name != "fsdp2" and engine_config.zero_stage < 3:
        parameters = {name: parameter.detach().flatten() for name, parameter in engine.model.named_parameters()}
        for owned in engine.owned_ranges():  # what is trained on
            part = parameters[owned.name][owned.start : owned.stop]
            assert torch.equal(part, owned.values["param"].to(part.dtype))
        found.append(float(sum(parameter.double().sum() for parameter in parameters.values())))
    return found, masters


def trained_by_each(fused: str) -> dict[str, tuple[list[float], dict[str, torch.Tensor]]]:
    return {name: losses_and_parameters(fused, engine) for name, engine in ENGINES.items()}


@pytest.fixture(scope="module")
def trained() -> dict[str, dict[str, tuple[list[float], dict[str, torch.Tensor]]]]:
    """By each kernel, with each engine."""
    return {fused: run_shared(1, trained_by_each, fused)[0] for fused in ("torch", "triton")}


@pytest.mark.parametrize("engine", ENGINES)
def test_this_packages_trains_like_torchs(trained, engine):
    wanted, masters = trained["torch"][engine]
    found, others = trained["triton"][engine]
    assert len(set(found)) == len(found)
    if ENGINES[engine].precision == "fp32":
        assert found == pytest.approx(wanted, rel=1e-5)
        torch.testing.assert_close(others, masters, rtol=0, atol=1e-4)
    else:  # a master that rounds the other way turns the signs of small gradients, and Adam makes them large
        assert found == pytest.approx(wanted, rel=1e-2)


def test_ranks_of_zero_1_hold_the_same_copies(trained):
    (one, _), (other, _) = run_shared(2, losses_and_parameters, "triton", ENGINES["zero 1 bf16"])
    alone, _ = trained["triton"]["zero 1 bf16"]
    assert one == other
    assert one == pytest.approx(alone, rel=1e-2)


def test_apex_trains_like_torch(apex):
    assert steps(engine_with("apex")[1], range(6)) == pytest.approx(steps(engine_with("torch")[1], range(6)), rel=1e-5)


@pytest.mark.parametrize("fused", ["apex", "torch", "triton"])
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
