"""A sweep with hydra/launcher=submitit_slurm under a real SLURM: a run that is preempted in its first minute saves and
goes on, and the other is left alone."""

import subprocess
import sys

import pytest

from tests.slurm.cluster import ROOT, RunFolder, clean_environment, wait_for

pytest.importorskip("submitit", reason="needs the extra submitit")
pytestmark = pytest.mark.slurm


def test_a_short_job_that_is_preempted_goes_on(cluster, training, uninterrupted, tmp_path):
    sweep = tmp_path / "sweep"
    other, run = RunFolder(sweep / "0_seed-1"), RunFolder(sweep / "1_seed-0")
    launcher = [
        "hydra/launcher=submitit_slurm",
        "hydra.launcher.timeout_min=5",
        f"hydra.launcher.nodes={cluster.nodes}",
    ]
    command = [
        sys.executable,
        "-m",
        "megatron_tn.train",
        "--multirun",
        *launcher,
        *training,
        "seed=1,0",
        f"run_dir={sweep}",
    ]
    environment = clean_environment(SLURM_CONF=str(cluster.base / "slurm.conf"))
    log = (tmp_path / "log").open("w")
    program = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log)

    def said() -> str:
        logs = [path.read_text(errors="replace") for path in sorted(sweep.glob(".submitit/*/*_log.*"))]
        return "\n".join([(tmp_path / "log").read_text(), *logs])

    try:
        wait_for(lambda: len(run.steps()) >= 5, 120, said)
        array = cluster.call("squeue", "--noheader", "--format=%F").split()[0]
        cluster.call("scancel", "--signal=USR1", f"{array}_1")
        wait_for(lambda: "this job is timed-out" in said(), 60, said)
        stopped = run.checkpoints()[-1]
        wait_for(lambda: program.poll() is not None, 150, said)
    finally:
        program.kill()
        program.wait()
    assert 5 <= stopped < 40
    assert run.status()["state"] == "finished", said()
    assert run.losses() == uninterrupted.losses()  # bitwise
    assert program.returncode == 0, said()
    assert other.steps() == run.steps()
    assert cluster.call("scontrol", "show", "job", f"{array}_0").count("Restarts=0") == 1
