"""The soak and its checks: each check sees a recovery that was broken on purpose; a short soak ends as it should."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from launch.soak import agent
from launch.soak.__main__ import Settings, main, show, summary_of
from launch.soak.check import Outcome, outcome_of, problems
from launch.soak.soak import Soak
from megatron_tn.training.run_folder import RunFolder
from tests.helpers.shards import make_text_shards
from tests.helpers.training import ROOT, SMALL, fork_ranks, train_here

WANTED = Outcome(
    state="finished",
    step=4,
    losses=[(step, 4.0 - step / 8, 1.0, 1e-3) for step in (1, 2, 3, 4)],
    data=[(step, 2 * step, 100 * step) for step in (1, 2, 3, 4)],
    position={"epoch": 0, "sample": 8},
    weights={"rank_00000.safetensors": "a" * 64, "rank_00001.safetensors": "b" * 64},
)


def changed(rows: Sequence[tuple], place: int, row: tuple) -> list[tuple]:
    return [*rows[:place], row, *rows[place + 1 :]]


@pytest.mark.parametrize(
    ("broken", "line"),
    [
        (replace(WANTED, step=3, state="failed"), "it ended at step 3, not 4 (state failed)"),
        (replace(WANTED, losses=WANTED.losses[:3]), "the journal does not have every step once and in order: [3]"),
        (replace(WANTED, losses=WANTED.losses[:2] + WANTED.losses[1:]), "once and in order: [2, 2, 3] ..., 5 records"),
        (replace(WANTED, losses=WANTED.losses[1:]), "once and in order: [2, 3] ..., 3 records"),
        (
            replace(WANTED, losses=changed(WANTED.losses, 2, (3, 3.625000000000001, 1.0, 1e-3))),
            "losses differ: (3, 3.625",
        ),
        (replace(WANTED, losses=changed(WANTED.losses, 3, (4, 3.5, 1.0, 2e-3))), "losses differ: (4, 3.5, 1.0, 0.002)"),
        (replace(WANTED, data=changed(WANTED.data, 1, (2, 4, 201))), "data differ: (2, 4, 201), not (2, 4, 200)"),
        (replace(WANTED, position={"epoch": 0, "sample": 6}), "the data stream stands at {'epoch': 0, 'sample': 6}"),
        (replace(WANTED, weights=WANTED.weights | {"rank_00001.safetensors": "c" * 64}), "differ in rank_00001"),
        (replace(WANTED, weights={}), "there is no checkpoint of step 4"),
        (replace(WANTED, leftovers=["status.tmp"]), "left behind: status.tmp"),
    ],
    ids=["step", "short", "twice", "gap", "loss", "rate", "data", "position", "weights", "checkpoint", "leftovers"],
)
def test_each_check_sees_a_recovery_that_was_broken(broken, line):
    assert problems(WANTED, WANTED) == problems(replace(WANTED, state="preempted"), WANTED) == []
    assert any(line in problem for problem in problems(broken, WANTED)), problems(broken, WANTED)


def test_what_is_left_behind_is_found(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.claim()
    run.write_status("finished", 0)
    run.release()
    assert outcome_of(run).leftovers == []
    names = ["log.tmp", ".slurm-7-0.failed", "checkpoints/step_00000002.tmp", "checkpoints/step_00000002-again"]
    for name in names:
        (run.path / name).mkdir(parents=True)
    code = "import fcntl, os, sys; fcntl.lockf(os.open(sys.argv[1], os.O_RDWR), fcntl.LOCK_EX); print(flush=1); input()"
    command = [sys.executable, "-c", code, str(run.path / "run.lock"), "megatron_tn.train", f"run_dir={run}"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=os.environ | {"RANK": "1"}, **pipes) as process:
        process.stdout.readline()
        found = outcome_of(run).leftovers
        process.communicate(b"\n")
    assert found[:-1] == [*names, f"process {process.pid} of rank 1"]
    assert found[-1].startswith("run.lock, held by ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("mtbf_s=0", "mtbf_s=0.0 must be above 0"),
        ("minutes=nan", "minutes=nan must be above 0"),
        ("patience_s=0", "patience_s=0.0 must be above 0 and finite"),
        ("heal_s=-1", "heal_s=-1.0 must be at least 0 and finite"),
        ("minutes=long", "minutes=long: not a number"),
        ("faults=kill,flood", "faults=flood: unknown; there are kill, segv, term,"),
        ("kill", "kill: not NAME=VALUE"),
        ("minuts=1", "unknown setting minuts; did you mean minutes"),
    ],
)
def test_settings(words, message):
    with pytest.raises(ValueError, match=message):
        Settings.parse(words.split())


def test_settings_that_the_trainers_refuse_are_told(tmp_path, monkeypatch, capfd):
    class Refusing:
        def __init__(self, processes: int, folder: Path, overrides: Sequence[str], log: Path):
            log.write_text("error: model.heads=4 is not divisible by parallel.tp=3\na launcher's own lines\n")

        def pids(self) -> dict[int, int]:
            return {}

        def exit_code(self) -> int:
            return 2

        def kill(self) -> None:
            pass

    monkeypatch.setattr("launch.soak.__main__.LocalTrainers", Refusing)
    assert main([f"output={tmp_path}", "data.manifest=x", "parallel.tp=3"]) == 2
    assert capfd.readouterr().err == "error: model.heads=4 is not divisible by parallel.tp=3\n"
    assert main([f"output={tmp_path / 'new'}", "optim.lrr=1"]) == 2  # before a corpus is made
    assert "error: unknown setting optim.lrr; did you mean optim.lr" in capfd.readouterr().err
    assert not (tmp_path / "new").exists()


def test_settings_leave_other_words_to_training():
    found = Settings.parse(["minutes=2", "faults=kill,stop", "seed=3", "patience_s=9", "model=20m", "optim.lr=1e-3"])
    assert (found.minutes, found.faults, found.seed, found.patience_s) == (2, ("kill", "stop"), 3, 9)
    assert found.overrides == ("model=20m", "optim.lr=1e-3")


@pytest.mark.parametrize(
    ("ends", "trains"),
    [
        ([{"step": 3, "loss": 2.5, "time": 20.0}], True),
        ([{"step": 3, "loss": 2.5, "time": 9.0}], False),  # of the start before
        ([{"step": 3, "loss": 2.5, "time": 20.0}, {"step": 3, "heldout_loss": 2.4, "time": 21.0}], True),
        ([{"step": 3, "loss": 2.5, "time": 20.0}, '{"step": 4, "lo'], True),
        ([{"start/began": 12.0, "time": 13.0}], False),
    ],
)
def test_a_start_that_has_taken_a_step_is_known_whatever_the_journal_ends_with(tmp_path, ends, trains):
    folder = RunFolder(tmp_path)
    lines = [end if isinstance(end, str) else json.dumps(end) + "\n" for end in ends]
    folder.journal.path.write_text("".join(['{"step": 1, "loss": 3.0, "time": 5.0}\n' * 999, *lines]))
    soak = Soak(folder, None, processes=1, mtbf_s=1, kinds=("kill",), heal_s=1, choice=random.Random(0))
    assert soak._trains_since(10.0) == trains


class ForkedTrainers:
    def __init__(self, folder: Path, overrides: Sequence[str]):
        self.folder = folder
        self.ranks = fork_ranks(2, train_with_agent, (*overrides, f"run_dir={folder}"))

    def pids(self) -> dict[int, int]:
        return {rank: process.pid for rank, process in enumerate(self.ranks)}

    def exit_code(self) -> int | None:
        codes = [process.exitcode for process in self.ranks]
        if None in codes:
            return None
        return next((128 - code if code < 0 else code for code in codes if code), 0)

    def kill(self) -> None:
        for process in self.ranks:
            process.kill()
            process.join()


def train_with_agent(overrides: tuple[str, ...]) -> None:
    sys.argv = ["megatron_tn.train", *overrides]
    agent.listen()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    train_here(overrides)


def test_a_short_soak(tmp_path, capsys):
    """Two faults, each of which ends a start, and a last stop: the weights are an undisturbed run's."""
    make_text_shards(tmp_path / "shards")
    words = [f"data.manifest={tmp_path}/shards/manifest.json", "parallel.tp=2", "deterministic=true"]
    words += ["schedule.steps=100000", "checkpoint.every=5", "hang_timeout_s=3", "distributed_timeout_s=10"]
    settings = Settings(seed=1, output=str(tmp_path))
    soak = Soak(
        RunFolder(tmp_path / "run"),
        lambda folder, more: ForkedTrainers(folder, (*SMALL, *words, *more)),
        processes=2,
        mtbf_s=0.5,
        kinds=("kill", "exception"),
        heal_s=1,
        choice=random.Random(1),
    )
    began = time.time()
    soak.run(lambda: len(soak.events) == 2)
    assert soak.problems == []
    soak.compare(RunFolder(tmp_path / "undisturbed"))
    assert soak.problems == []
    summary = json.loads(json.dumps(summary_of(settings, soak)))
    assert sum(summary["faults"].values()) == 2
    goodput = summary["goodput"]
    assert 2 <= goodput["starts"] <= 3  # a kill may come before the first step
    assert goodput["steps"] == summary["steps"] > 0
    assert 0 < goodput["useful_s"] < goodput["wall_s"] < time.time() - began
    assert min(goodput["lost_s"][cause] for cause in ("startup", "checkpoint", "down")) > 0
    show(summary)
    assert "equal an undisturbed run's bit for bit" in capsys.readouterr().out


@pytest.mark.full
def test_three_minutes_of_every_fault_through_the_launcher(tmp_path):
    words = ["minutes=3", "mtbf_s=15", "heal_s=8", "seed=2", f"output={tmp_path}"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # where the checkout has no .venv of its own
    done = subprocess.run([sys.executable, "-m", "launch.soak", *words], env=os.environ | {"PATH": path}, cwd=ROOT)
    assert done.returncode == 0, (tmp_path / "trainers.log").read_text()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(summary["events"]) >= 3
    assert summary["problems"] == []
