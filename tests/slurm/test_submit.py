"""launch.submit under a real SLURM: a hostile folder, a failure that is requeued, a chain that ends at its budget."""

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


def test_submit_requeue_chain(cluster, training, uninterrupted, tmp_path):
    run = RunFolder(tmp_path / HOSTILE)
    shape = ["cluster=cpu", f"nodes={cluster.nodes}", "slurm.exclusive=false", "slurm.chain=2", "slurm.failures=1"]
    budget = ["slurm.tokens=3000", "slurm.dependency=afterany", "checkpoint.every=5"]  # 128 a step: 24 steps
    command = [sys.executable, "-m", "launch.submit", *training, *shape, *budget, f"run_dir={run.path}"]
    environment = clean_environment(SLURM_CONF=str(cluster.base / "slurm.conf"), PYTHONPATH=str(ROOT))
    done = subprocess.run(command, env=environment, cwd=cluster.folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (submission,) = Submission.all_of(Folder(run.path))
    ids = submission.read()["jobs"]
    first, second = (Job(cluster, number, submission.path / f"{number}.log") for number in ids)
    assert second.field("Dependency").startswith(f"afterany:{first.id}")

    first.wait_for(lambda: Folder(run.path).saved())
    os.kill(run.trainer(rank=1), signal.SIGKILL)
    first.wait_for_end()
    assert (first.field("JobState"), first.field("Restarts")) == ("COMPLETED", "1"), first.output()
    assert "(1 of 2 failures without a new checkpoint): requeueing; the job goes on from step" in first.output()
    second.wait_for_end()
    assert "the run has reached step 24, its last: nothing to do" in second.output()
    assert second.field("JobState") == "COMPLETED"
    assert run.status()["state"] == "finished"
    assert run.losses() == uninterrupted.losses()[:24]  # bitwise
    assert not list(Path(tmp_path).rglob("marker")) + list(cluster.folder.rglob("marker"))

    status = [sys.executable, "-m", "launch.status", str(tmp_path), "--wide"]
    said = subprocess.run(
        status, env=environment, cwd=cluster.folder, capture_output=True, text=True, timeout=120
    ).stdout
    assert "state: finished" in said
    assert "step: 24 of 24" in said
    assert "restarts: 1" in said
    assert "last failure: step" in said
