"""What surrounds the steps: the frozen config, the journal, sinks that fail, ranks from SLURM's variables."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import sys

import pytest

from megatron_tn.config import OptimConfig, TrainConfig, WandbConfig, save
from megatron_tn.parallel import world
from megatron_tn.training.hooks.console import ConsoleProgress
from megatron_tn.training.hooks.journal import Journal
from megatron_tn.training.hooks.weights_and_biases import WeightsAndBiases
from megatron_tn.training.preemption import Preemption
from megatron_tn.training.preflight import frozen_config
from megatron_tn.training.state import TrainingState
from megatron_tn.training.step import StepReport
from megatron_tn.training.throughput import Work

WORK = Work(flops_per_token=6_000_000_000, processes=2, peak_tflops=400.0)
REPORT = StepReport(loss=2.5, tokens=100, lr=1e-3, grad_norm=1.0, applied=True, stop=False)


@pytest.fixture
def frozen(tmp_path) -> tuple[TrainConfig, TrainConfig]:
    """A config as it was at the start, and as someone would have it now."""
    old = TrainConfig(run_dir=str(tmp_path))
    save(old, tmp_path / "config.json")
    return old, dataclasses.replace(old, optim=OptimConfig(lr=0.5))


def test_a_requeued_job_runs_what_was_frozen(frozen, monkeypatch):
    old, new = frozen
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    config, notes = frozen_config(new)
    assert config == old
    assert "wins, because SLURM requeued this job" in notes[0]
    assert notes[1:] == ["optim.lr: 0.0003 -> 0.5"]


def test_a_person_gets_what_they_ask_for_and_is_told_the_difference(frozen, monkeypatch):
    _, new = frozen
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    config, notes = frozen_config(new)
    assert config == new
    assert "the new settings win" in notes[0]


def test_the_first_start_and_an_unchanged_one_say_nothing(frozen, tmp_path):
    old, _ = frozen
    assert frozen_config(old) == (old, [])
    fresh = TrainConfig(run_dir=str(tmp_path / "elsewhere"))
    assert frozen_config(fresh) == (fresh, [])


def run_steps(journal: Journal, first: int, last: int) -> None:
    state = TrainingState(step=first - 1)
    journal.on_start(state)
    for _ in range(first, last + 1):
        state.count(REPORT, samples=1)
        journal.on_step(state, REPORT)
    journal.on_stop(state)


def steps_in(path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_rewound_run_leaves_one_clean_curve_and_loses_nothing(tmp_path):
    path = tmp_path / "log.jsonl"
    run_steps(Journal(path, 1, WORK), 1, 6)
    with path.open("a") as file:
        file.write('{"step": 7, "lo')  # the process died while it wrote
    run_steps(Journal(path, 1, WORK), 5, 8)
    assert steps_in(path) == [1, 2, 3, 4, 5, 6, 7, 8]
    set_aside = (tmp_path / "log.superseded.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in set_aside[:2]] == [5, 6]
    assert set_aside[2] == '{"step": 7, "lo'


@pytest.mark.parametrize("torn", [b'{"step": 4, "lo', b'{"step": \xff\xfe', b"\0" * 50], ids=["cut", "bytes", "zeros"])
def test_a_last_line_that_a_dying_host_cut_short(tmp_path, torn):
    run_steps(Journal(tmp_path / "log.jsonl", 1, WORK), 1, 3)
    whole = (tmp_path / "log.jsonl").read_bytes()
    (tmp_path / "log.jsonl").write_bytes(whole + torn)
    run_steps(Journal(tmp_path / "log.jsonl", 1, WORK), 4, 5)
    assert steps_in(tmp_path / "log.jsonl") == [1, 2, 3, 4, 5]
    assert (tmp_path / "log.superseded.jsonl").read_bytes() == torn + b"\n"


def test_a_last_line_without_its_end_stays_a_line(tmp_path):
    run_steps(Journal(tmp_path / "log.jsonl", 1, WORK), 1, 3)
    path = tmp_path / "log.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    run_steps(Journal(tmp_path / "log.jsonl", 1, WORK), 4, 4)
    assert steps_in(path) == [1, 2, 3, 4]


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), SystemExit(1)], ids=["print", "rich"])
def test_progress_that_nobody_reads_any_more_stops_nothing(monkeypatch, caplog, error):
    class Closed(io.StringIO):
        def write(self, text):
            raise error

    monkeypatch.setattr(sys, "stdout", Closed())
    hook, state = ConsoleProgress(3), TrainingState()
    hook.on_start(state)
    for _ in range(3):
        state.count(REPORT, samples=1)
        hook.on_step(state, REPORT)
    hook.on_stop(state)
    assert [record.message.partition(":")[0] for record in caplog.records] == ["progress cannot be printed"]


def test_a_signal_that_comes_again_on_the_way_out_does_nothing():
    before = signal.getsignal(signal.SIGUSR1)
    try:
        with Preemption() as preemption:
            os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)  # by default this ends a process
        assert preemption.received == "SIGUSR1"
    finally:
        signal.signal(signal.SIGUSR1, before)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_every_so_many_steps(tmp_path):
    run_steps(Journal(tmp_path / "log.jsonl", 3, WORK), 1, 7)
    assert steps_in(tmp_path / "log.jsonl") == [3, 6]


def test_throughput_says_what_it_was_divided_by(tmp_path):
    run_steps(Journal(tmp_path / "log.jsonl", 1, WORK), 1, 2)
    record = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert record["model_tflops"] == pytest.approx(6e9 * record["tokens_per_second"] / 2 / 1e12)
    assert record["utilisation"] == pytest.approx(record["model_tflops"] / record["peak_tflops"])
    assert record["peak_tflops"] == 400.0
    assert "utilisation" not in Work(6, 1, None).rates(1e3)


@pytest.mark.parametrize("moment", ["init", "log", "finish"])
def test_wandb_never_stops_training(tmp_path, monkeypatch, caplog, moment):
    import wandb

    class Broken:
        def log(self, *_, **__):
            if moment == "log":
                raise OSError("no route to host")

        def finish(self):
            if moment == "finish":
                raise OSError("no route to host")

    def init(**_):
        if moment == "init":
            raise OSError("no route to host")
        return Broken()

    monkeypatch.setattr(wandb, "init", init)
    hook, state = WeightsAndBiases(WandbConfig(), tmp_path, {}, WORK), TrainingState()
    hook.on_start(state)
    hook.on_step(state, REPORT)
    hook.on_stop(state)
    assert "no route to host; going on without it" in caplog.text


def test_wandb_keeps_one_id_for_a_run(tmp_path, monkeypatch):
    import wandb

    seen = []
    monkeypatch.setattr(wandb, "init", lambda **settings: seen.append(settings["id"]))
    for _ in range(2):
        WeightsAndBiases(WandbConfig(), tmp_path, {}, WORK).on_start(TrainingState())
    assert seen[0] == seen[1]


def test_wandb_shows_one_curve_after_a_rewind(tmp_path, monkeypatch):
    """What is told to each part of a run, by id."""
    import wandb

    told: dict[str, list[int]] = {}

    class Part:
        def __init__(self, name: str):
            self.steps = told.setdefault(name, [])

        def log(self, values, step):
            self.steps.append(step)

        def finish(self): ...

    monkeypatch.setattr(wandb, "init", lambda **settings: Part(settings["id"]))
    journal, board = Journal(tmp_path / "log.jsonl", 1, WORK), WeightsAndBiases(WandbConfig(), tmp_path, {}, WORK)
    state = TrainingState()

    def take(steps: int) -> None:
        for _ in range(steps):
            state.count(REPORT, samples=1)
            for hook in (journal, board):
                hook.on_step(state, REPORT)

    for hook in (journal, board):
        hook.on_start(state)
    take(6)
    state.become(TrainingState(step=4, rewinds=[{"from": 7, "to": 4}]))
    for hook in (journal, board):
        hook.on_rewind(state)
    take(3)
    board.on_stop(state)
    # A restart goes on with the same part, and tells nothing twice.
    again = WeightsAndBiases(WandbConfig(), tmp_path, {}, WORK)
    again.on_start(state)
    first = (tmp_path / "wandb_id").read_text()
    assert told == {first: [1, 2, 3, 4, 5, 6], f"{first}-r1": [1, 2, 3, 4, 5, 6, 7]}
    assert steps_in(tmp_path / "log.jsonl") == [1, 2, 3, 4, 5, 6, 7]


def test_ranks_from_srun(tmp_path, monkeypatch):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\nprintf 'node7\\nnode8\\n'\n")
    scontrol.chmod(0o755)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that it is put back as it was, whatever the code under test sets
        monkeypatch.delenv(name)
    slurm = {"PROCID": "3", "LOCALID": "1", "STEP_NUM_TASKS": "4", "STEP_NODELIST": "node[7-8]", "JOB_ID": "54321"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert world.world_size() == 4
    world._translate_slurm()
    found = [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")]
    assert found == ["3", "4", "1", "node7", "24321"]
