"""Saving while training goes on, and dying at any moment of it."""

import contextlib
import functools
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from megatron_tn.checkpoint import save as save_module
from megatron_tn.checkpoint.background import CheckpointWriter
from megatron_tn.checkpoint.load import Reader, load_checkpoint
from megatron_tn.checkpoint.manifest import CheckpointManifest, whole_checkpoints
from megatron_tn.checkpoint.retention import Retention
from megatron_tn.checkpoint.save import CheckpointError, write_tensors
from megatron_tn.config import to_mapping
from megatron_tn.engine.build import initialize_engine
from megatron_tn.parallel.world import join_world
from megatron_tn.training.hooks.checkpoint import CheckpointEvery
from megatron_tn.training.state import TrainingState
from tests.checkpoint.engines import make_engine, one_step
from tests.engine.test_parity import LOCAL, ZERO
from tests.helpers.checkpoints import save_checkpoint
from tests.helpers.ranks import run_shared
from tests.helpers.steps import REPORT
from tests.helpers.training import fork_ranks


def content(config, step: int) -> dict:
    return {"optimizer_step": step, "config": to_mapping(config), "training": {"step": step, "tokens": 0}}


def save_both_ways(folder: Path, tp: int, engine_config) -> list[float]:
    """Save steps 1 and 2 at once, then the same steps in the background with training going on."""
    config, engine = make_engine(tp, engine_config)
    initialize_engine(engine, seed=5)
    writer = CheckpointWriter(folder / "background", Retention(), background=True, timeout_s=60)
    losses = []
    for step in (1, 2):
        losses.append(one_step(engine, seed=step))
        save_checkpoint(engine, folder / "at_once", step=step, **content(config, step))
        writer.save(engine, step, **content(config, step))
    losses.append(one_step(engine, seed=3))  # changes every master while the last file is being written
    assert writer.close().error is None
    return losses


@pytest.mark.parametrize(("world", "tp", "engine"), [(1, 1, LOCAL), (4, 2, ZERO[1])], ids=["local", "4xzero1tp2"])
def test_the_files_are_those_of_a_save_that_training_waits_for(tmp_path, world, tp, engine):
    run_shared(world, save_both_ways, tmp_path, tp, engine)
    for one in whole_checkpoints(tmp_path / "at_once"):
        other = tmp_path / "background" / one.name
        names = sorted(path.name for path in one.iterdir())
        assert names == sorted(path.name for path in other.iterdir())
        assert len(names) == world + 1
        for name in names:
            assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.fixture
def slow(monkeypatch) -> threading.Event:
    """The disk answers when this is set."""
    answers = threading.Event()

    def write(path, tensors):
        assert answers.wait(60)
        return write_tensors(path, tensors)

    monkeypatch.setattr(save_module, "write_tensors", write)
    return answers


def test_training_goes_on_while_the_disk_is_slow_and_the_next_save_waits(tmp_path, slow):
    config, engine = make_engine(1, LOCAL)
    initialize_engine(engine, seed=5)
    writer = CheckpointWriter(tmp_path, Retention(), background=True, timeout_s=60)
    writer.prepare(engine)
    saved = [owned.values["param"].clone() for owned in engine.owned_ranges()]
    assert writer.save(engine, 1, **content(config, 1)) is None
    one_step(engine, seed=1)
    assert writer.finished() is None
    assert whole_checkpoints(tmp_path) == []
    threading.Timer(0.3, slow.set).start()
    before = writer.save(engine, 2, **content(config, 2))
    assert (before.step, before.error) == (1, None)
    assert before.wait_s <= before.pause_s < 0.2 < before.write_s
    last = writer.close()
    assert last.pause_s >= last.wait_s > 0.2  # it waited for the first
    load_checkpoint(engine, before.path)
    assert all(torch.equal(a, b.values["param"]) for a, b in zip(saved, engine.owned_ranges(), strict=True))


def test_a_pause_is_recorded_at_once_and_the_last_step_waits_for_the_write(tmp_path, slow):
    config, engine = make_engine(1, LOCAL)
    initialize_engine(engine, seed=5)
    writer = CheckpointWriter(tmp_path, Retention(), background=True, timeout_s=60)
    recorded = []
    hook = CheckpointEvery(
        writer,
        functools.partial(writer.prepare, engine),
        lambda state: writer.save(engine, state.step, **content(config, state.step)),
        report=lambda *_: None,
        record=lambda values, step: recorded.append((step, values)),
        every=2,
        last=3,
        at_end=False,
        abort=False,
    )
    hook.on_start(TrainingState(step=1))
    hook.on_step(TrainingState(step=2), REPORT)
    ((step, pause),) = recorded
    assert (step, pause["checkpoint/step"]) == (2, 2)
    assert 0 < pause["checkpoint/pause_s"] < 0.2
    assert whole_checkpoints(tmp_path) == []
    time.sleep(0.2)  # the wait begins later than the write
    threading.Timer(0.3, slow.set).start()
    hook.on_step(TrainingState(step=3), REPORT)
    _, (_, wait), (step, written) = recorded
    assert (step, written["checkpoint/step"], written["checkpoint/failed"]) == (3, 2, False)
    assert 0.2 < wait["checkpoint/pause_s"] < written["checkpoint/write_s"]
    assert [path.name for path in whole_checkpoints(tmp_path)] == ["step_00000002"]
    hook.on_stop(TrainingState(step=3))


def fail_on_one_rank(folder: Path) -> tuple[str, list[str]]:
    config, engine = make_engine(1, ZERO[1])
    initialize_engine(engine, seed=5)
    writer = CheckpointWriter(folder, Retention(newest=1), background=True, timeout_s=60)
    writer.save(engine, 1, **content(config, 1))
    writer.wait()
    if engine.context.rank == 1:
        full = mock.patch.object(save_module, "write_tensors", side_effect=OSError("full"))
    else:
        full = contextlib.nullcontext()
    with full:
        writer.save(engine, 2, **content(config, 2))
        one_step(engine, seed=1)  # training's own collectives are not disturbed
        failed = writer.wait()
    assert isinstance(failed.error, CheckpointError)
    writer.save(engine, 3, **content(config, 3))
    assert writer.close().error is None
    return str(failed.error), sorted(path.name for path in folder.iterdir())


def test_a_write_that_fails_on_one_rank_is_known_to_all_and_the_next_succeeds(tmp_path):
    for error, _ in run_shared(2, fail_on_one_rank, tmp_path):
        assert "step_00000002 could not be written: rank 1: OSError: full" in error
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


def save_for_ever(folder: Path, ready) -> None:
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        join_world(60)
    config, engine = make_engine(int(os.environ.get("WORLD_SIZE", "1")), LOCAL)
    initialize_engine(engine, seed=5)
    writer = CheckpointWriter(folder, Retention(newest=2), background=True, timeout_s=60)
    first = max([int(path.name[5:13]) for path in whole_checkpoints(folder)], default=0) + 1
    for step in range(first, first + 10_000):
        # The step is in the values, so that a mixture of two saves cannot pass for one.
        for owned in engine.owned_ranges():
            for values in owned.values.values():
                values.fill_(step)
        for _ in range(1 + (step % 5 == 0)):  # now and then the same step again, as after a rewind
            before = writer.save(engine, step, **content(config, step))
            if before and before.error:
                sys.exit(f"another rank is gone: {before.error}")
        if step == first + 1:
            ready.set()


def kill_and_load(folder: Path, times: int, ranks: int = 1) -> None:
    """Kill one of the processes that save, at random moments; after each the last checkpoint must be whole."""
    draw, forkserver = random.Random(6), multiprocessing.get_context("forkserver")
    last = 0
    for _ in range(times):
        ready = forkserver.Event()
        processes = fork_ranks(ranks, save_for_ever, folder, ready)
        assert ready.wait(120)
        time.sleep(draw.random() * 0.06)
        os.kill(draw.choice(processes).pid, signal.SIGKILL)
        for process in processes:
            process.join(120)
        assert all(process.exitcode for process in processes)
        newest = whole_checkpoints(folder)[-1]
        manifest = CheckpointManifest.read(newest)
        assert manifest.step > last  # the new process went on from what it found and saved at least once more
        last = manifest.step
        config, engine = make_engine(1, LOCAL)
        load_checkpoint(engine, newest)
        assert all((v == last).all() for owned in engine.owned_ranges() for v in owned.values.values())
        with Reader(newest, manifest) as reader:
            assert reader.rng(0)
    writer = CheckpointWriter(folder, Retention(newest=2), background=False, timeout_s=60)
    writer.save(engine, last + 1, **content(config, last + 1))
    writer.close()
    assert all(path.suffix == "" and "again" not in path.name for path in folder.iterdir())  # what was partial is gone


@pytest.mark.parametrize("ranks", [1, 2])
def test_kill_9_at_random_moments(tmp_path, ranks):
    kill_and_load(tmp_path, 7 - 2 * ranks, ranks)


@pytest.mark.full
@pytest.mark.parametrize("ranks", [1, 2])
def test_kill_9_at_50_random_moments(tmp_path, ranks):
    kill_and_load(tmp_path, 50, ranks)
