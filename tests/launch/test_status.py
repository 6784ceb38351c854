"""launch.status: what it says of runs that train, wait, failed and fell silent."""

import json
import os
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launch.status import TITLES, Job, main, row_of, runs_below
from megatron_tn.config import ScheduleConfig, TrainConfig
from megatron_tn.training.run_folder import RunFolder
from megatron_tn.training.submission import Submission
from megatron_tn.training.watchdog.signs import Sign, new_folder
from tests.helpers.training import call
from tests.helpers.waiting import no_waiting

NOW = 1_800_000_000.0


@pytest.fixture
def run(tmp_path) -> RunFolder:
    """Step 40 of 100, two seconds a step, a second ago."""
    run = RunFolder(tmp_path / "runs/first")
    run.freeze(TrainConfig(run_dir=str(run), schedule=ScheduleConfig(steps=100, warmup_steps=1)), "17")
    record = {"loss": 2.5, "tokens_per_second": 1234.0, "utilisation": 0.414, "step_seconds": 2.0}
    lines = [record | {"step": step, "time": NOW - 81 + 2 * step} for step in range(1, 41)]
    run.journal.path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run.status_file.write_text(json.dumps({"state": "running", "step": 0, "time": NOW - 90}))
    return run


def test_a_run_under_way(run):
    jobs = [Job("17", "17", "N/A", "RUNNING", "x"), Job("18", "18", "N/A", "PENDING", "y")]
    assert row_of(run, jobs, NOW) == {
        "run": str(run),
        "state": "running, job 17 running",
        "step": "40 of 100",
        "loss": "2.5000",
        "tokens/s": "1,234",
        "utilisation": "41.4%",
        "time left": "2.0 min",
        "restarts": "0",
        "last failure": "",
    }
    assert row_of(run, [], NOW + 3600)["state"] == "running, silent for 60.0 min"
    sign = Sign(0, socket.gethostname(), os.getpid())
    sign.write(folder := new_folder(run))
    assert row_of(run, [], NOW)["state"] == "running"
    replace(sign, pid=2**22 + 1).write(folder)  # no such process here
    assert row_of(run, [], NOW)["state"] == "died without a word"
    replace(sign, pid=2**22 + 1, host="another").write(folder)
    assert row_of(run, [], NOW)["state"] == "running"
    assert row_of(run, [Job("17", "17", "N/A", "PENDING", "x")], NOW + 3600)["state"] == "requeued, job 17 pending"


def test_what_stopped_a_run_last(run):
    line = '2026-11-29T20:00:00+0000 job=17 restart={} code={} cause="{}" {}saved=20 step=34\n'
    text = line.format(0, 75, "a hang (exit code 75)", "") + line.format(1, 0, "told to stop", "")
    (run.path / "requeues.log").write_text(text + line.format(2, 137, r"rank 3\u001b[2J died", "gave-up "))
    row = row_of(run, [], NOW)
    assert (row["restarts"], row["last failure"]) == ("2", "step 34: rank 3\\x1b[2J died")
    run.write_status("failed", 41, error="OSError: disk full")
    row = row_of(run, [], NOW)
    assert (row["state"], row["step"], row["last failure"]) == ("failed", "41 of 100", "step 41: OSError: disk full")


def test_starts_by_hand_are_restarts_and_may_fail(run, monkeypatch):
    """Steps that a later start took back count, too, and a kill may leave a record twice. A journal is read once."""
    started = [{"step": step, "time": NOW + step, "start/began": NOW + step} for step in (0, 20, 20, 30)]
    failed = {"step": 30, "time": NOW + 35, "stop/state": "failed", "stop/error": "OSError: disk full"}
    run.journal.append(started[:2])
    run.journal.superseded.write_text("".join(json.dumps(record) + "\n" for record in [*started[2:], failed]))
    opened, real = [], Path.open
    monkeypatch.setattr(Path, "open", lambda path, *rest, **named: opened.append(path) or real(path, *rest, **named))
    row = row_of(run, [], NOW)
    assert (row["restarts"], row["last failure"]) == ("2", "step 30: OSError: disk full")
    assert opened.count(run.journal.path) == 2  # its end, and all of it
    assert opened.count(run.journal.superseded) == 1
    lines = ['job=17 restart=0 code=75 cause="a hang" saved=20 step=34', "job=17 restart=1 code=0 saved=34 step=34"]
    for hung, cause in ((NOW + 30, "step 30: OSError: disk full"), (NOW + 40, "step 34: a hang")):
        times = [time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(at)) for at in (hung, NOW + 50)]
        run.requeues.write_text("".join(f"{at} {line}\n" for at, line in zip(times, lines, strict=True)))
        assert row_of(run, [], NOW)["last failure"] == cause


def test_a_run_that_waits_for_its_first_start(tmp_path):
    run = RunFolder(tmp_path / "next")
    submission = Submission.new(run)
    submission.freeze(TrainConfig(stop_after=7))
    submission.record({"jobs": ["21", "22"]})
    jobs = [Job("21", "21", "N/A", "PENDING", "x"), Job("22", "22", "N/A", "PENDING", "x")]
    row = row_of(run, jobs, NOW)
    assert (row["state"], row["step"]) == ("not started, job 21 pending, job 22 pending", "0 of 7")


def test_a_task_of_a_sweep_has_its_own_job(tmp_path):
    """The last task's SLURM_JOB_ID is the array's number."""
    sweep, runs = RunFolder(tmp_path / "sweep"), [RunFolder(tmp_path / f"sweep/{name}") for name in "ab"]
    submission = Submission.new(sweep)
    submission.record({"jobs": ["30"], "runs": [str(run) for run in runs]})
    for run, job in zip(runs, ("31", "30"), strict=True):
        run.freeze(TrainConfig(), job)
    jobs = [Job("31", "30", "0", "RUNNING", "x"), Job("30", "30", "1", "PENDING", "x")]
    assert [row_of(run, jobs, NOW)["state"].partition(", ")[2] for run in runs] == [
        "job 30_0 running",
        "job 30_1 pending",
    ]


OTHERS = ("config.json", "status.json", "requeues.log", "job.json", "submitted/a/submission.json")


@pytest.mark.parametrize(
    ("make", "restarts"),
    [(lambda file: file.write_bytes(b'\xff{"step":\0 ['), "1"), (os.mkfifo, "0")],
    ids=["bytes", "fifo"],
)
def test_a_damaged_run_has_a_row(make, restarts, tmp_path):
    """Also where a file is a FIFO, whose reader would wait for a writer."""
    (tmp_path / "submitted/a").mkdir(parents=True)
    for name in OTHERS:
        make(tmp_path / name)
    (tmp_path / "log.jsonl").write_bytes(b'\xff{"step":\0 [')
    with no_waiting():
        row = row_of(RunFolder(tmp_path), [], NOW)
    assert (row["state"], row["step"], row["restarts"]) == ("not started", "0", restarts)


def test_the_end_of_a_long_journal_is_read(run):
    content = run.journal.path.read_text()
    run.journal.path.write_text(content * 500)
    began = time.perf_counter()
    assert run.journal.tail()[-1]["step"] == 40
    assert len(run.journal.tail(1000)) < 12
    assert time.perf_counter() - began < 0.5


SQUEUE = """#!/bin/sh
echo "$@" >"$0.words"
printf '17|17|N/A|RUNNING|%s/submitted/a/job.sbatch\\n19|18|1|PENDING|/elsewhere/script.sh\\n' "{run}"
"""


def test_the_command_line(run, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)  # readline, which pytest imports, sets it
    other = RunFolder(tmp_path / "runs/deep/er")
    other.freeze(TrainConfig(), None)
    other.journal.append([{"step": "two", "step_seconds": None, "time": NOW}])
    piped = RunFolder(tmp_path / "runs/piped")
    piped.freeze(TrainConfig(), None)
    os.mkfifo(piped.journal.path)
    assert list(runs_below(tmp_path)) == [other.path, run.path, piped.path]
    with no_waiting():
        assert call(main, str(tmp_path / "runs")) == 0
    said = capsys.readouterr().out
    assert all(title in said for title in TITLES)
    assert str(run) in said
    assert str(other) in said
    assert call(main, str(tmp_path / "runs"), "--wide") == 0
    said = capsys.readouterr().out
    assert "state: a file of it cannot be read: TypeError" in said
    assert f"OSError: [Errno 22] not a regular file: '{piped.journal.path}'" in said
    squeue = tmp_path / "bin/squeue"
    squeue.parent.mkdir()
    squeue.write_text(SQUEUE.format(run=run))
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{squeue.parent}:{os.environ['PATH']}")
    assert call(main, "--user=anna", "--wide") == 0
    said = capsys.readouterr().out
    assert "--user=anna" in squeue.with_name("squeue.words").read_text()
    assert f"run: {run}\nstate: running, silent for " in said or f"run: {run}\nstate: running, job 17 running\n" in said
    assert str(other) not in said
    assert call(main, str(tmp_path / "bin")) == 2
    assert f"no run in {tmp_path / 'bin'}" in capsys.readouterr().err
    for words, line in (
        (("--wide",), "no folder of runs is named, and no --user"),
        (("runs", "--wde"), "unknown option --wde"),
    ):
        assert call(main, *words) == 2
        assert line in capsys.readouterr().err


def test_folders_that_are_no_runs_have_none(tmp_path, monkeypatch):
    assert list(runs_below(tmp_path / "nowhere")) == []
    for name in ("hers", "mine"):
        RunFolder(tmp_path / name).freeze(TrainConfig(), None)
    is_there = RunFolder.is_there.fget

    def guarded(run: RunFolder) -> bool:
        if run.path.name == "hers":
            raise PermissionError
        return is_there(run)

    monkeypatch.setattr(RunFolder, "is_there", property(guarded))
    assert list(runs_below(tmp_path)) == [tmp_path / "mine"]
