"""`executor=slurm`: datatrove's job arrays under a real SLURM give what processes of this machine give."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from data_pipeline.config import compose
from data_pipeline.run import run
from tests.slurm.cluster import ROOT, Job, clean_environment, wait_for

pytestmark = pytest.mark.slurm
DEMO = ["pipeline=demo", "sources.stdlib.fill=[]", "sources.stdlib.minimum_bytes=0", "tasks=3"]
SMALL = [*DEMO, "near_duplicates.buckets=4", "tokenizer.vocab_size=512", "shard_tokens=60_000"]
SLURM = ["executor=slurm", "slurm.partition=test", "slurm.mem_per_cpu_gb=1", "slurm.time=10"]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> list[str]:
    """The demo's pipeline over a small part of the standard library."""
    folder = tmp_path_factory.mktemp("source")
    shutil.copytree(Path(sysconfig.get_path("stdlib"), "asyncio"), folder / "asyncio")
    return [*SMALL, f"sources.stdlib.path={folder}"]


@pytest.fixture(scope="module")
def local(source, tmp_path_factory) -> dict[str, str]:
    output = tmp_path_factory.mktemp("local") / "data"
    run(compose([*source, f"output={output}"]))
    return fingerprint(output)


def fingerprint(output: Path) -> dict[str, str]:
    """Hashes of everything that a run gives its users: shards, manifests, tokenizer, records, report."""
    files = [path for path in output.rglob("*") if path.is_file() and "work" not in path.relative_to(output).parts]
    return {
        str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name not in (".lock", "pipeline.json")
    }


def start(cluster, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "data_pipeline.run", *overrides]
    environment = clean_environment(SLURM_CONF=str(cluster.base / "slurm.conf"))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, cwd=ROOT, text=True, start_new_session=True, **pipes)


def jobs(output: Path) -> dict[str, str]:
    path = output / "work/slurm.json"
    return json.loads(path.read_bytes()) if path.exists() else {}


def test_job_arrays_write_the_same_bytes_as_local_processes(cluster, source, local, tmp_path):
    output = tmp_path / """it's "data" of 100% %A $(touch marker) `touch marker`; #"""
    process = start(cluster, *source, *SLURM, f"output={output}")
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert fingerprint(output) == local
    assert f"{output}/train: " in out
    submitted = jobs(output)
    assert next(iter(submitted)) == "rules"
    assert list(submitted)[-1] == "report"
    # Each is an array, and waits for the one before.
    stage = next((output / "work/stages").glob("*_exact"))
    assert "#SBATCH --array=0-2" in (stage / "launch_script.slurm").read_text()
    assert len(list((stage / "slurm_logs").iterdir())) == 3
    assert not list(tmp_path.rglob("marker")) + list(ROOT.glob("marker"))

    process = start(cluster, *source, *SLURM, f"output={output}")  # nothing is left to do
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "submitted" not in errors
    assert jobs(output) == submitted


@pytest.mark.full
def test_a_failed_task_is_named_with_its_log_and_the_next_run_does_only_what_is_left(cluster, source, local, tmp_path):
    output = tmp_path / "data"
    output.mkdir()
    # A folder where task 1 of the first stage must write its file.
    obstacle = output / "work/ruled/00001.jsonl.zst/x"
    # Two arrays, of which only the second is what the next stage depends on: it must not run on what the first left.
    process = start(cluster, *source, *SLURM, "slurm.max_array_size=2", "slurm.wait=false", f"output={output}")
    wait_for(lambda: (output / "work").is_dir(), 60, lambda: "no output")
    obstacle.mkdir(parents=True)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "jobs submitted" in out

    process = start(cluster, *source, "executor=local", f"output={output}")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "of an earlier start are still in the queue" in errors

    process = start(cluster, *source, *SLURM, f"output={output}")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "following the jobs of an earlier start" in errors
    assert "stage rules, task 1: IsADirectoryError" in errors
    assert "work/stages/00_rules/logs/task_00001.log" in errors
    # What depended on it leaves the queue.
    wait_for(lambda: not cluster.call("squeue", "--noheader", "--format=%A"), 60, lambda: cluster.call("squeue"))
    assert not list(output.glob("work/stages/*_exact_find/completions/*"))

    shutil.rmtree(obstacle.parent)
    done = {path: path.stat().st_mtime_ns for path in (output / "work/stages/00_rules/completions").iterdir()}
    assert {path.name for path in done} == {"00000", "00002"}
    process = start(cluster, *source, *SLURM, f"output={output}")
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert fingerprint(output) == local
    assert done == {path: path.stat().st_mtime_ns for path in done}
    assert json.loads((output / "work/stages/00_rules/ranks_to_run.json").read_text()) == [1]


def test_pipeline_sbatch_runs_it_on_one_node(cluster, source, local, tmp_path):
    log = tmp_path / "log"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # where the checkout has no .venv of its own
    options = ["--parsable", "--cpus-per-task=2", f"--output={log}", f"--export=ALL,PATH={path}"]
    script = str(ROOT / "launch/pipeline.sbatch")
    job = Job(cluster, cluster.call("sbatch", *options, script, *source, f"output={tmp_path}/data"), log)
    job.wait_for_end()
    assert (job.field("JobState"), job.field("ExitCode")) == ("COMPLETED", "0:0"), job.output()
    assert fingerprint(tmp_path / "data") == local


@pytest.mark.parametrize(
    ("override", "message", "code"),
    [
        ("slurm.partition=null", "slurm.partition: missing", 2),
        ("slurm.partition=nowhere", "sbatch refused a stage", 2),
        pytest.param(
            "slurm.env_command='echo no python here; exit 3'", "stage rules: SLURM job", 1, marks=pytest.mark.full
        ),
    ],
    ids=["no partition", "unknown partition", "environment fails"],
)
def test_what_slurm_cannot_run_is_one_clear_line(cluster, source, tmp_path, override, message, code):
    output = tmp_path / "data"
    process = start(cluster, *source, *SLURM, override, f"output={output}")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    assert message in errors
    assert "Traceback" not in errors
    assert not cluster.call("squeue", "--noheader", "--format=%A")
    assert os.listdir(tmp_path) == ([] if override == "slurm.partition=null" else ["data"])
