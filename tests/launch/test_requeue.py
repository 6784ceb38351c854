"""Which jobs are requeued: decisions of launch/requeue.py, which runs with the standard library alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.requeue import newest, records
from megatron_tn.training.run_folder import RunFolder
from tests.helpers.training import ROOT
from tests.helpers.waiting import no_waiting

STARTED = 1000.0
CUDA_ERROR = """CUDA error: device-side assert triggered
CUDA kernel errors might be asynchronously reported at some other API call"""
NO_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.19 GiB"


@pytest.fixture
def run_dir(tmp_path) -> Path:
    return tmp_path


def save(run_dir: Path, step: int) -> None:
    checkpoint = run_dir / f"checkpoints/step_{step:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")


def status(run_dir: Path, **values: object) -> None:
    (run_dir / "status.json").write_text(json.dumps({"time": STARTED + 1} | values))


def after(run_dir: Path, code: int, *, restart: int = 0, failures: int = 2, job: str = "17", chain: str = ""):
    """(whether the job is requeued, what is said) after its trainers ended with `code`."""
    words = ["--job", job, "--restart", str(restart), "--code", str(code), "--since", str(STARTED)]
    return call("after", str(run_dir), *words, "--failures", str(failures), "--chain", chain)


def call(*words: str) -> tuple[bool, str]:
    command = [sys.executable, "-I", "-S", str(ROOT / "launch/requeue.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode in (0, 10), done.stderr) == (True, "")
    return done.returncode == 0, done.stdout


def test_failures_are_requeued_as_long_as_there_is_a_new_checkpoint_between_them(run_dir):
    said = []
    for restart, saved in enumerate([None, 10, None, None, 20, None, None]):
        if saved:
            save(run_dir, saved)
        status(run_dir, state="failed", step=11 + restart, error="RuntimeError: CUDA error")
        said.append(after(run_dir, 1, restart=restart))
    assert [requeued for requeued, _ in said] == [True, True, True, False, True, True, False]
    assert said[0][1] == (
        "launch/train.sbatch: RuntimeError: CUDA error (1 of 3 failures without a new checkpoint): requeueing; the job "
        "goes on from its beginning\n"
    )
    assert "requeueing; the job goes on from step 20" in said[4][1]
    assert "requeued 2 times at the same newest checkpoint; giving up" in said[-1][1]
    kept = records(run_dir)
    assert [record["saved"] for record in kept] == ["-1", "10", "10", "10", "20", "20", "20"]
    assert (kept[0]["cause"], kept[0]["step"], kept[0]["code"]) == ("RuntimeError: CUDA error", "11", "1")
    assert ["gave-up" in record for record in kept] == [not requeued for requeued, _ in said]
    assert after(run_dir, 1, job="18")[0]  # a person submitted it again


@pytest.mark.parametrize(
    ("code", "error", "cause"),
    [
        (75, None, "a hang (exit code 75)"),
        (137, None, "a rank was killed by signal 9 (exit code 137)"),
        (134, None, "a rank was killed by signal 6 (exit code 134)"),  # NCCL's thread found the CUDA context lost
        (1, f"AcceleratorError: {CUDA_ERROR}", f"AcceleratorError: {' '.join(CUDA_ERROR.splitlines())}"),
        (1, f"OutOfMemoryError: {NO_MEMORY}", f"OutOfMemoryError: {NO_MEMORY}"),
        (1, 'OSError: a "quoted"\nname \\ saved=99 step=98', 'OSError: a "quoted" name \\ saved=99 step=98'),
    ],
)
def test_the_cause_is_said_and_kept(run_dir, code, error, cause):
    save(run_dir, 5)
    status(run_dir, state="failed" if error else "running", step=7, **({"error": error} if error else {}))
    assert after(run_dir, code)[0]
    kept = records(run_dir)[-1]
    assert (kept["cause"], kept["saved"], kept["step"]) == (cause, "5", "7")


@pytest.mark.parametrize(
    ("code", "values", "options", "why"),
    [
        (1, {"error": "TrainingAborted: step 9: loss nan"}, {}, "its settings end the run"),
        (2, {}, {}, "the settings are wrong"),
        (2, {"begun": True}, {"restart": 0}, "the settings are wrong"),
        (1, {}, {"failures": 0}, "failures=0"),
    ],
    ids=["guard", "bad settings", "another start's", "no requeues"],
)
def test_what_no_second_start_would_mend_is_not_requeued(run_dir, code, values, options, why):
    if values.pop("begun", False):
        (run_dir / "job.json").write_text('{"job": "17", "begun": true}')
    status(run_dir, state="failed", step=9, **values)
    requeued, said = after(run_dir, code, **options)
    assert (requeued, why in said) == (False, True)


def test_settings_that_a_job_has_trained_with_are_not_what_is_wrong(run_dir):
    (run_dir / "job.json").write_text('{"job": "17", "begun": true}')
    assert after(run_dir, 2, restart=1)[0]
    (run_dir / "job.json").write_text('{"job": "16", "begun": true}')
    assert not after(run_dir, 2, restart=1)[0]


def test_the_status_of_an_earlier_start_is_no_cause(run_dir):
    status(run_dir, state="failed", step=9, error="OSError: of yesterday", time=STARTED - 60)
    assert "a hang (exit code 75)" in after(run_dir, 75)[1]


def test_a_damaged_file_of_the_run_keeps_no_job_from_being_requeued(run_dir):
    settings = run_dir / "settings.json"
    for text in ('{"time": null, "step": null, "state": "finished", "schedule": [1]}', "[" * 5000):
        for file in (run_dir / "status.json", settings):
            file.write_text(text)
        assert after(run_dir, 75)[0]
        assert call("ready", str(run_dir), str(settings), "c")[0]


def test_a_job_that_is_told_to_stop_without_a_step_of_progress_gives_up(run_dir):
    (run_dir / "requeues.log").write_text(
        "".join(f"2026-11-01T00:00:00+0000 job=17 restart={n} step=4\n" for n in (0, 1))
    )
    save(run_dir, 4)
    status(run_dir, state="preempted", step=4)
    assert after(run_dir, 0, restart=2, failures=0)[0]
    assert not after(run_dir, 0, restart=3, failures=0)[0]
    save(run_dir, 5)
    assert after(run_dir, 0, restart=4, failures=0)[0]


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_without_a_log_the_number_of_restarts_decides(run_dir, make):
    make(run_dir / "requeues.log")
    with no_waiting():
        assert after(run_dir, 1, restart=1)[0]
        assert not after(run_dir, 1, restart=2)[0]


def test_a_job_of_a_chain_starts_while_there_is_something_to_train(run_dir):
    settings = run_dir / "settings.json"
    settings.write_text('{"stop_after": 8, "schedule": {"steps": 10}}')

    def ready() -> tuple[bool, str]:
        return call("ready", str(run_dir), str(settings), "mine")

    assert ready() == (True, "launch/train.sbatch: the run goes on from step 0\n")
    status(run_dir, state="finished", step=8)
    assert ready()[0] is False
    status(run_dir, state="finished", step=6)  # of an earlier budget
    assert ready()[0] is True
    assert not after(run_dir, 2, chain="mine")[0]
    assert ready() == (False, "launch/train.sbatch: job 17 of this chain gave up, so this one does not start\n")
    assert call("ready", str(run_dir), str(settings), "another")[0] is True


def test_the_newest_checkpoint_is_that_of_the_run_folder(run_dir):
    assert newest(run_dir) == -1
    for name in ("step_00000003", "step_00000004-again", "step_00000009.tmp", "step_00000007", "step_00000008_copy"):
        (run_dir / "checkpoints" / name).mkdir(parents=True)
        if name != "step_00000007":
            (run_dir / "checkpoints" / name / "manifest.json").write_text("{}")
    assert newest(run_dir) == max(RunFolder(run_dir).saved()) == 4
