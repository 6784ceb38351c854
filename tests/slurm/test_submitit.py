"""Sweeps with hydra/launcher=submitit_slurm under a real SLURM without sacct: a run that is preempted in its first
minute saves and goes on, and the other is left alone; a run that fails, or is told to stop, has failed for SLURM, and
the command ends."""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import ROOT, RunFolder, clean_environment, wait_for

pytest.importorskip("submitit", reason="needs the extra submitit")
pytestmark = pytest.mark.slurm


@contextlib.contextmanager
def sweep_of(cluster, sweep: Path, words: list[str]) -> Iterator[tuple[subprocess.Popen, Callable[[], str]]]:
    """The command of a sweep of seeds 1 and 0, a job each, and what it and its jobs have said so far."""
    launcher = ["hydra.launcher.timeout_min=5", f"hydra.launcher.nodes={cluster.nodes}"]
    chosen = ["--multirun", "hydra/launcher=submitit_slurm", *launcher, *words, "seed=1,0", f"run_dir={sweep}"]
    environment = clean_environment(SLURM_CONF=str(cluster.base / "slurm.conf"))
    log = sweep.with_suffix(".log").open("w")
    command = [sys.executable, "-m", "megatron_tn.train", *chosen]
    program = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log)

    def said() -> str:
        logs = [path.read_text(errors="replace") for path in sorted(sweep.glob(".submitit/*/*_log.*"))]
        return "\n".join([sweep.with_suffix(".log").read_text(), *logs])

    try:
        yield program, said
    finally:
        program.kill()
        program.wait()


def array_of(cluster) -> str:
    """Number of the job array in the queue."""
    return cluster.call("squeue", "--noheader", "--format=%F").split()[0]


def test_a_short_job_that_is_preempted_goes_on(cluster, training, uninterrupted, tmp_path):
    sweep = tmp_path / "sweep"
    other, run = RunFolder(sweep / "0_seed-1"), RunFolder(sweep / "1_seed-0")
    with sweep_of(cluster, sweep, training) as (program, said):
        wait_for(lambda: len(run.steps()) >= 5, 120, said)
        array = array_of(cluster)
        cluster.call("scancel", "--signal=USR1", f"{array}_1")
        wait_for(lambda: "this job is timed-out" in said(), 60, said)
        stopped = run.checkpoints()[-1]
        wait_for(lambda: program.poll() is not None, 150, said)
    assert 5 <= stopped < 40
    assert run.status()["state"] == "finished", said()
    assert run.losses() == uninterrupted.losses()  # bitwise
    assert program.returncode == 0, said()
    assert other.steps() == run.steps()
    assert cluster.call("scontrol", "show", "job", f"{array}_0").count("Restarts=0") == 1


def test_a_job_that_fails_or_is_told_to_stop_has_failed_for_slurm_and_ends_the_command(cluster, training, tmp_path):
    sweep = tmp_path / "sweep"
    broken, run = RunFolder(sweep / "0_seed-1"), RunFolder(sweep / "1_seed-0")
    broken.path.mkdir(parents=True)
    (broken.path / "config.json").write_text("{")
    with sweep_of(cluster, sweep, [*training, "schedule.steps=100000"]) as (program, said):
        wait_for(lambda: len(run.steps()) >= 5, 120, said)
        array = array_of(cluster)
        cluster.call("scancel", "--signal=TERM", f"{array}_1")
        wait_for(lambda: program.poll() is not None, 60, said)
        assert program.returncode == 1, said()
        assert "config.json is damaged" in said()
        assert run.status()["state"] == "preempted", said()
        assert run.checkpoints() == [run.steps()[-1]]
        for task, code in (("0", 2), ("1", 1)):
            shown = f"{array}_{task}"
            wait_for(lambda shown=shown: "JobState=FAILED" in cluster.call("scontrol", "show", "job", shown), 30, said)
            assert f"ExitCode={code}:0" in cluster.call("scontrol", "show", "job", shown)
