"""A real SLURM of four virtual nodes on this machine, and a small corpus to train on."""

import os
import random
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import ROOT, Cluster, RunFolder, clean_environment

HERE = Path(__file__).resolve().parent
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
COMMANDS = ("slurmctld", "slurmd", "sbatch", "munged", "unshare")
NODES = 4  # of the cluster; jobs take two of them, test_faults.py's take all
STEPS = 40


def require_slurm() -> None:
    """Skips where no SLURM can be started; installs Debian's packages where they are missing."""
    if os.geteuid() != 0:
        pytest.skip("starting SLURM daemons for virtual nodes needs root")
    if any(shutil.which(command) is None for command in COMMANDS):
        if shutil.which("apt-get") is None:
            pytest.skip(f"SLURM is not installed, and there is no apt-get to install {' '.join(PACKAGES)}")
        quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for words in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
            done = subprocess.run(["apt-get", "--quiet", *words], env=quiet, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"SLURM cannot be installed: {done.stderr.strip().splitlines()[-1:]}")
    if subprocess.run(["unshare", "--mount", "--uts", "true"], capture_output=True).returncode:
        pytest.skip("virtual nodes need mount and UTS namespaces, which this machine does not allow")


def free_ports(count: int) -> int:
    """The first of `count` consecutive free ports below the range that the kernel hands out."""
    for _ in range(100):
        first = random.randrange(20_000, 30_000 - count)
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    pytest.fail("no free ports")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    require_slurm()
    base = Path(tempfile.mkdtemp(prefix="slurm-"))  # not below pytest's own folder, which is closed to others
    jobs = base / "jobs"
    disk = base / "disk"  # small, and mounted before the nodes copy the table of mounts
    for folder in (jobs, disk):
        folder.mkdir()
    environment = clean_environment()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "faults", disk], check=True)
    try:
        port = free_ports(NODES + 1)
        up = [HERE / "cluster-up.sh", base, str(NODES), str(port)]
        subprocess.run(up, env=environment, stdin=subprocess.DEVNULL, check=True, timeout=120)
        yield Cluster(base, jobs, nodes=2)
    finally:
        subprocess.run([HERE / "cluster-down.sh", base], env=environment, check=True, timeout=120)
        subprocess.run(["umount", "--lazy", disk], check=True)
        shutil.rmtree(base, ignore_errors=True)


@pytest.fixture(scope="session")
def training(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a training of STEPS short steps, tensor parallel over two processes, on a small corpus made here."""
    shards = tmp_path_factory.mktemp("corpus")
    source = Path(sysconfig.get_path("stdlib"), "asyncio")
    pipeline = [f"input={source}", f"output={shards}", "tokenizer.vocab_size=512", "tasks=2", "near_duplicates=null"]
    command = [sys.executable, "-m", "data_pipeline.run", "pipeline=code", *pipeline]
    subprocess.run(command, check=True, env=clean_environment(), cwd=ROOT, capture_output=True, timeout=120)
    size = {"vocab_size": 512, "embed_dim": 32, "layers": 2, "heads": 2, "glu_dim": 64}
    return [
        "model=demo",
        *(f"model.{key}={value}" for key, value in size.items()),
        "parallel.tp=2",
        "engine=zero1",
        "engine.precision=fp32",
        "deterministic=true",
        f"data.manifest={shards}/train/manifest.json",
        "data.sequence_length=64",
        "data.global_batch=2",
        "data.micro_batch=2",
        "data.workers=0",
        f"schedule.steps={STEPS}",
        "schedule.warmup_steps=5",
        "checkpoint.every=0",
        "logging=quiet",
    ]


@pytest.fixture(scope="session")
def uninterrupted(training: list[str], tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The same training through launch/local.sh, without SLURM and without a stop."""
    run = RunFolder(tmp_path_factory.mktemp("uninterrupted"))
    command = [ROOT / "launch/local.sh", "-n", "2", *training, f"run_dir={run.path}"]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert run.status()["state"] == "finished"
    return run


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run_dir that is not there yet."""
    return RunFolder(tmp_path / "run")
