"""What the tests here see of SLURM and of a run: jobs, their logs, and what is in run_dir."""

import dataclasses
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.soak.faults import trainers_of

ROOT = Path(__file__).resolve().parents[2]


def clean_environment(**more: str) -> dict[str, str]:
    """This process's environment without what would reach into a run; one thread, so that CPU runs are comparable."""
    theirs = ("SLURM_", "SBATCH_", "PET_", "MASTER_", "NPROC_PER_NODE", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(theirs)}
    return kept | {"OMP_NUM_THREADS": "1"} | more


def wait_for(condition: Callable[[], object], seconds: float, what: Callable[[], str]) -> None:
    """Polls until `condition()` is true; fails with `what()` when it takes longer than `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"not within {seconds} s: {what()}")
        time.sleep(0.2)


@dataclasses.dataclass
class RunFolder:
    """What a run leaves in its run_dir."""

    path: Path

    def records(self) -> list[dict]:
        """The training steps in log.jsonl, in the order in which they were written."""
        log = self.path / "log.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return [line for line in lines if "loss" in line]

    def steps(self) -> list[int]:
        return [record["step"] for record in self.records()]

    def losses(self) -> list[float]:
        return [record["loss"] for record in self.records()]

    def status(self) -> dict:
        return json.loads((self.path / "status.json").read_text())

    def checkpoints(self) -> list[int]:
        """Steps of the checkpoints."""
        return sorted(int(folder.name.rpartition("_")[2]) for folder in (self.path / "checkpoints").glob("step_*"))

    def trainer(self, rank: int) -> int:
        """PID of the process of this run that has this rank."""
        found = trainers_of(self.path)
        assert rank in found, f"no process of rank {rank} of {self.path}"
        return found[rank]


@dataclasses.dataclass
class Job:
    cluster: "Cluster"
    id: str
    log: Path

    def field(self, name: str) -> str:
        """A field of `scontrol show job`: JobState, Restarts, ExitCode."""
        shown = self.cluster.call("scontrol", "show", "job", self.id)
        return next(word.partition("=")[2] for word in shown.split() if word.startswith(f"{name}="))

    def ended(self) -> bool:
        return not self.cluster.call("squeue", "--noheader", "--job", self.id)

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait_for(self, condition: Callable[[], object], seconds: float = 120) -> None:
        """Also fails as soon as the job has ended without it."""
        wait_for(lambda: condition() or self.ended(), seconds, self.as_it_is)
        if not condition():
            pytest.fail(f"not before its end: {self.as_it_is()}")

    def as_it_is(self) -> str:
        return f"job {self.id} is {self.field('JobState')}; its log:\n{self.output()}"

    def wait_for_end(self, seconds: float = 180) -> None:
        self.wait_for(self.ended, seconds)

    def ends(self) -> list[str]:
        """How the trainers ended, a line for each time they were started."""
        return [line for line in self.output().splitlines() if "the trainers ended" in line]


@dataclasses.dataclass
class Cluster:
    """base: cluster-up.sh's folder. folder: where jobs are submitted and their logs are. nodes: of a job."""

    base: Path
    folder: Path
    nodes: int

    def call(self, *words: str) -> str:
        environment = clean_environment(SLURM_CONF=str(self.base / "slurm.conf"))
        done = subprocess.run(words, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, *overrides: str, failures: int = 3) -> Job:
        """launch/train.sbatch on all nodes, a process each. failures: requeues without a new checkpoint."""
        log = self.folder / f"{len(list(self.folder.glob('*.log')))}.log"
        log.touch()
        script = str(ROOT / "launch/train.sbatch")
        options = [f"--nodes={self.nodes}", f"--output={log}", f"--export=ALL,MEGATRON_TN_FAILURES={failures}"]
        return Job(self, self.call("sbatch", "--parsable", *options, script, *overrides), log)
