"""launch/train.sbatch under a real SLURM: the signal before the limit, requeue, resume, cancellation, failure."""

import os
import signal
import sys

import pytest

from tests.slurm.cluster import ROOT

pytestmark = pytest.mark.slurm


def test_preempted_job_goes_on_as_if_nothing_had_happened(cluster, training, uninterrupted, run):
    job = cluster.submit(*training, f"run_dir={run.path}")

    job.wait_for(lambda: len(run.steps()) >= 5)
    cluster.call("scancel", "--batch", "--signal=USR1", job.id)  # what SLURM does ahead of the time limit
    job.wait_for(lambda: "restart 1" in job.output())
    first = run.checkpoints()[-1]
    assert run.steps() == list(range(1, first + 1))  # saved at the step it stopped at, none done twice or lost

    job.wait_for(lambda: len(run.steps()) >= first + 5)
    os.kill(run.trainer(rank=1), signal.SIGTERM)  # one rank alone, on the second node
    job.wait_for(lambda: "restart 2" in job.output())
    second = run.checkpoints()[-1]
    assert run.steps() == list(range(1, second + 1))

    job.wait_for_end()
    assert (job.field("JobState"), job.field("ExitCode"), job.field("Restarts")) == ("COMPLETED", "0:0", "2")
    assert f"at step {first}\n" in job.output()
    assert f"at step {second}\n" in job.output()
    assert run.status()["state"] == "finished"
    assert run.steps() == uninterrupted.steps() == list(range(1, 41))
    assert run.losses() == uninterrupted.losses()  # bitwise
    requeues = (run.path / "requeues.log").read_text().splitlines()
    assert [line.split()[-1] for line in requeues] == [f"step={first}", f"step={second}"]


def test_cancelled_job_saves_and_stays_cancelled(cluster, training, uninterrupted, run):
    job = cluster.submit(*training, f"run_dir={run.path}")
    job.wait_for(lambda: len(run.steps()) >= 5)
    cluster.call("scancel", job.id)
    job.wait_for_end()

    saved = run.checkpoints()[-1]
    assert run.status()["state"] == "preempted"
    assert run.steps() == list(range(1, saved + 1))
    assert (job.field("JobState"), job.field("Restarts")) == ("CANCELLED", "0")

    again = cluster.submit(*training, f"run_dir={run.path}")
    again.wait_for_end()
    assert run.status()["state"] == "finished", again.output()
    assert run.losses() == uninterrupted.losses()


def test_signal_before_the_trainers_listen_is_not_lost(cluster, training, run):
    job = cluster.submit(*training, f"run_dir={run.path}")
    job.wait_for(lambda: "restart 0" in job.output())
    cluster.call("scancel", "--batch", "--signal=TERM", job.id)
    job.wait_for_end()
    assert run.status()["state"] == "preempted", job.output()
    assert run.checkpoints() == run.steps()[-1:]
    assert (job.field("JobState"), job.field("ExitCode"), job.field("Restarts")) == ("COMPLETED", "0:0", "0")


@pytest.mark.full
def test_killed_trainer_is_requeued_until_it_gets_no_further(cluster, training, uninterrupted, run):
    job = cluster.submit(*training, f"run_dir={run.path}", failures=1)
    superseded = run.path / "log.superseded.jsonl"  # of the first start's steps, once the second has begun
    for restart in range(2):
        job.wait_for(lambda restart=restart: superseded.exists() == bool(restart) and len(run.steps()) >= 2)
        os.kill(run.trainer(rank=1), signal.SIGKILL)
        job.wait_for(lambda restart=restart: len(job.ends()) == restart + 1)
    job.wait_for_end()
    assert (job.field("JobState"), job.field("Restarts")) == ("FAILED", "1"), job.output()
    assert job.field("ExitCode") == f"{128 + signal.SIGKILL}:0", job.output()
    assert "(1 of 2 failures without a new checkpoint): requeueing; the job goes on from its beginning" in job.output()
    assert "requeued 1 times at the same newest checkpoint; giving up" in job.output()


def test_bad_configuration_fails_the_job_for_good(cluster, training, run):
    job = cluster.submit(*training, f"run_dir={run.path}", "parallel.tp=3")
    job.wait_for_end()
    assert (job.field("JobState"), job.field("ExitCode"), job.field("Restarts")) == ("FAILED", "2:0", "0"), job.output()
    assert "model.heads=2 is not divisible by parallel.tp=3" in job.output()
    assert not run.path.exists()


def test_run_dir_is_required(cluster, training):
    job = cluster.submit(*training)
    job.wait_for_end()
    assert (job.field("JobState"), job.field("ExitCode")) == ("FAILED", "2:0")
    assert len(job.output().splitlines()) == 1
    assert "run_dir=" in job.output()


def test_srun_alone_starts_the_ranks(cluster, training, uninterrupted, run):
    words = ("-m", "megatron_tn.train", *training, f"run_dir={run.path}", "stop_after=6")
    cluster.call("srun", "--nodes=2", "--ntasks=2", "--chdir", str(ROOT), sys.executable, *words)
    assert run.status()["state"] == "finished"
    assert run.losses() == uninterrupted.losses()[:6]
