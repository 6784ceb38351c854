"""launch/local.sh: the same way of signals and exit codes as train.sbatch, on one machine."""

import os
import signal
import subprocess
import sys
import time
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
    assert "data.manifest=none: " in done.stderr


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


STOPS = """
import os, pathlib, signal, sys, time
told = pathlib.Path(__file__).with_name("stopped")
if os.environ["RANK"] == "1":
    told.write_text(f"/proc/{os.getpid()}/stat")
    os.kill(os.getpid(), signal.SIGSTOP)
while not (told.exists() and ") T " in pathlib.Path(told.read_text()).read_text()):
    time.sleep(0.05)
told.with_name("ended").touch()
sys.exit(75)
"""


def test_the_first_workers_code_counts_and_a_stopped_worker_gets_no_time(tmp_path: Path):
    (tmp_path / "worker.py").write_text(STOPS)
    words = ["-m", "launch.torchrun", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2"]
    command = [sys.executable, *words, tmp_path / "worker.py"]
    (temporary := tmp_path / "temporary").mkdir()
    environment = clean_environment() | {"TMPDIR": str(temporary)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 75, done.stderr
    assert list(temporary.iterdir()) == []  # torchrun alone leaves a folder at each start
    assert time.time() - (tmp_path / "ended").stat().st_mtime < 25  # torchrun alone waits for 30 s
