"""launch.submit under a real SLURM: a hostile folder, a failure that is requeued, a chain that ends at its budget; a
sweep of which one task fails."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tn.training.run_folder import RunFolder as Folder
from megatron_tn.training.submission import Submission
from tests.slurm.cluster import ROOT, Job, RunFolder, clean_environment

pytestmark = pytest.mark.slurm

HOSTILE = """it's a "run" $(touch marker) `touch marker`; touch marker &|<>*? =,[x] %j #"""


def submit(cluster, training: list[str], *words: str) -> Submission:
    """The newest submission of run_dir, the last word."""
    shape = ["cluster=cpu", f"nodes={cluster.nodes}", "slurm.exclusive=false", "slurm.failures=1", "checkpoint.every=5"]
    done = call(cluster, "launch.submit", *training, *shape, *words)
    assert done.returncode == 0, done.stderr
    folder = words[-1].removeprefix("run_dir=").strip("'")
    return Submission.all_of(Folder(folder))[-1]


def call(cluster, module: str, *words: str) -> subprocess.CompletedProcess:
    environment = clean_environment(SLURM_CONF=str(cluster.base / "slurm.conf"), PYTHONPATH=str(ROOT))
    command = [sys.executable, "-m", module, *words]
    return subprocess.run(command, env=environment, cwd=cluster.folder, capture_output=True, text=True, timeout=120)


def test_submit_requeue_chain(cluster, training, uninterrupted, tmp_path):
    run = RunFolder(tmp_path / HOSTILE)
    budget = ["slurm.tokens=3000", "slurm.dependency=afterany", "slurm.chain=3"]  # 128 a step: 24 steps
    submission = submit(cluster, training, *budget, f"run_dir={run.path}")
    ids = submission.read()["jobs"]
    first, cancelled, last = (Job(cluster, number, submission.path / f"{number}.log") for number in ids)

    first.wait_for(lambda: Folder(run.path).saved())
    cluster.call("scancel", cancelled.id)
    os.kill(run.trainer(rank=1), signal.SIGKILL)
    first.wait_for_end()
    assert (first.field("JobState"), first.field("Restarts")) == ("COMPLETED", "1"), first.output()
    assert "(1 of 2 failures without a new checkpoint): requeueing; the job goes on from step" in first.output()
    last.wait_for_end()
    assert "the run has reached step 24, its last: nothing to do" in last.output()
    assert last.field("JobState") == "COMPLETED"
    assert run.status()["state"] == "finished"
    assert run.losses() == uninterrupted.losses()[:24]  # bitwise
    assert not list(Path(tmp_path).rglob("marker")) + list(cluster.folder.rglob("marker"))

    said = call(cluster, "launch.status", str(tmp_path), "--wide").stdout
    assert "state: finished" in said
    assert "step: 24 of 24" in said
    assert "restarts: 1" in said
    assert "last failure: step" in said


@pytest.mark.full
def test_a_task_of_a_sweep_fails_by_itself(cluster, training, uninterrupted, tmp_path):
    """The task whose SLURM_JOB_ID is the number of the whole array."""
    submission = submit(cluster, training, "--multirun", "seed=1,0", f"run_dir='{tmp_path}/a sweep'")
    (array,) = submission.read()["jobs"]
    other, failing = (Job(cluster, f"{array}_{n}", submission.path / f"{array}_{n}.log") for n in range(2))
    theirs, run = (RunFolder(Path(path)) for path in submission.read()["runs"])

    failing.wait_for(lambda: Folder(run.path).saved())
    assert failing.field("JobId") == array
    os.kill(run.trainer(rank=1), signal.SIGKILL)
    for job, restarts in ((failing, "1"), (other, "0")):
        job.wait_for_end()
        assert (job.field("JobState"), job.field("Restarts")) == ("COMPLETED", restarts), job.output()
    assert run.losses() == uninterrupted.losses()  # bitwise
    assert theirs.steps() == uninterrupted.steps()
    assert theirs.losses() != uninterrupted.losses()
