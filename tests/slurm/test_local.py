"""launch/local.sh: the same way of signals and exit codes as train.sbatch, on one machine."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.slurm.cluster import ROOT, clean_environment, wait_for

pytestmark = pytest.mark.slurm
LOCAL = ROOT / "launch/local.sh"


def test_ctrl_c_saves_and_stops(training, run, tmp_path: Path):
    # More steps than it can get through before the signal arrives.
    training = [word for word in training if not word.startswith("schedule.steps=")]
    words = [LOCAL, "-n", "2", *training, "schedule.steps=1000000", f"run_dir={run.path}"]
    with (tmp_path / "log").open("w") as log:
        started = subprocess.Popen(words, env=clean_environment(), stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(lambda: len(run.steps()) >= 3, 120, (tmp_path / "log").read_text)
        os.killpg(started.pid, signal.SIGINT)  # a terminal signals everything in the foreground
        assert started.wait(timeout=60) == 0, (tmp_path / "log").read_text()
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGQUIT)
            started.wait()
    assert run.status()["state"] == "preempted"
    assert run.checkpoints() == run.steps()[-1:]


def test_help_and_sweeps(tmp_path: Path):
    def said(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run([LOCAL, *words], env=clean_environment(), cwd=tmp_path, capture_output=True, text=True)

    shown = said("--help").stdout
    assert "launch/local.sh [-n PROCESSES]" in shown
    assert "\n  optim.lr=" in shown
    # Words for Hydra may stand in front, and reach the trainer, which refuses this sweep for its data.
    done = said("-n", "1", "--multirun", "optim.lr=1e-3,1e-4", "model=demo", "data.manifest=none")
    assert "data.manifest: manifest none" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-n", "none", "model=demo"], "-n none is not a number of processes"),
        ([], "no overrides"),
    ],
    ids=["bad-option", "nothing"],
)
def test_bad_input_exits_with_2(words, message, tmp_path: Path):
    done = subprocess.run([LOCAL, *words], env=clean_environment(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []
