"""Saving from a GPU: page-locked host memory, and a snapshot that later steps do not reach."""

import dataclasses
import time
from pathlib import Path

import pytest
import torch

from megatron_tn.checkpoint.background import CheckpointWriter
from megatron_tn.checkpoint.load import load_checkpoint
from megatron_tn.checkpoint.manifest import whole_checkpoints
from megatron_tn.checkpoint.retention import Retention
from megatron_tn.config import EngineConfig
from megatron_tn.device.host_memory import HostMemory
from megatron_tn.engine.build import build_engine, initialize_engine
from megatron_tn.training.diagnose import find_nonfinite
from megatron_tn.training.step import train_step
from tests.checkpoint.test_background import content
from tests.helpers.checkpoints import save_checkpoint
from tests.helpers.models import TINY, Rows, random_batch, tiny_config
from tests.helpers.ranks import layout, run_shared, this_device

pytestmark = pytest.mark.gpu
# 57 M parameters: 0.7 GB of masters and moments.
MEDIUM = dataclasses.replace(TINY, embed_dim=1024, glu_dim=2816, layers=4)
ENGINES = [EngineConfig(name="local", precision="bf16"), EngineConfig(name="deepspeed", zero_stage=1, precision="bf16")]


def one_step(engine, seed: int):
    tokens, targets = random_batch(4, 256, MEDIUM, seed=seed)
    return train_step(engine, [Rows(tokens, targets)], 1e-3, this_device())


def owned_values(engine) -> list[torch.Tensor]:
    return [values for owned in engine.owned_ranges() for values in owned.values.values()]


def save_both_ways(folder: Path, engine_config: EngineConfig) -> tuple[float, float, bool]:
    """(pause, seconds of the write, whether a load brings back what was saved)."""
    config = tiny_config(model=MEDIUM, engine=engine_config)
    engine = build_engine(config, layout(), this_device())
    initialize_engine(engine, 3)
    one_step(engine, 0)
    writer = CheckpointWriter(folder / "background", Retention(newest=1), background=True, timeout_s=60)
    writer.prepare(engine)
    one_step(engine, 4)
    writer.save(engine, 1, **content(config, 1))  # waits for the host memory
    writer.wait()
    saved = [values.clone() for values in owned_values(engine)]
    save_checkpoint(engine, folder / "at_once", step=2, **content(config, 2))
    began = time.perf_counter()
    writer.save(engine, 2, **content(config, 2))
    pause = time.perf_counter() - began
    for seed in range(1, 4):
        one_step(engine, seed)
    done = writer.close()
    assert done.error is None
    load_checkpoint(engine, done.path)
    same = all(torch.equal(a, b) for a, b in zip(saved, owned_values(engine), strict=True))
    return pause, done.write_s, same


@pytest.mark.parametrize("engine", ENGINES, ids=lambda e: e.name)
def test_the_files_are_those_of_a_save_that_training_waits_for(tmp_path, engine):
    ((pause, write, same),) = run_shared(1, save_both_ways, tmp_path, engine, device="cuda")
    print(f"\n{engine.name}: pause {1000 * pause:.1f} ms, write {1000 * write:.0f} ms")
    assert pause < write
    assert same
    (one,), (other,) = (whole_checkpoints(tmp_path / name) for name in ("at_once", "background"))
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name


def test_host_memory_is_page_locked_and_reused():
    torch.zeros(1, device="cuda")
    memory = HostMemory()
    memory.prepare(1 << 20, pinned=True)
    first = memory.take(1 << 20, pinned=True)
    assert first.is_pinned()
    assert memory.take(1 << 19, pinned=True).data_ptr() == first.data_ptr()
    memory.release()


def find_on_the_gpu(engine_config: EngineConfig) -> tuple[bool, list[str], bool]:
    model = dataclasses.replace(TINY, lrpe="all")  # whose compiled blocks share one graph
    config = tiny_config(model=model, engine=dataclasses.replace(engine_config, compile="blocks"))
    engine = build_engine(config, layout(), this_device())
    initialize_engine(engine, 3)
    one_step(engine, 0)
    name = "model.layers.1.channel_mixer.l1.weight"
    parameter = dict(engine.model.named_parameters())[name]
    handle = parameter.register_hook(lambda gradient: gradient * float("nan"))
    tokens, targets = random_batch(4, 256, MEDIUM, seed=1)
    report = train_step(engine, [Rows(tokens, targets)], 1e-3, this_device())
    found = find_nonfinite(engine, [Rows(tokens, targets)], this_device())
    handle.remove()
    return report.applied, [culprit.tensor for culprit in found], one_step(engine, 2).applied


@pytest.mark.parametrize("engine", ENGINES, ids=lambda e: e.name)
def test_a_gradient_that_is_not_finite_is_found_in_compiled_blocks(engine):
    ((applied, found, next_applied),) = run_shared(1, find_on_the_gpu, engine, device="cuda")
    assert not applied
    assert found == ["the gradient of model.layers.1.channel_mixer.l1.weight"]
    assert next_applied
