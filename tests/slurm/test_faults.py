"""Training under a real SLURM with every kind of fault: the run ends at the same step, with the same data, losses and
weights as an undisturbed one, bit for bit, and leaves nothing behind.

A table, a fault a row. `make test-slurm` runs four of them, one after the other in one job; `make test-slurm-full` runs
each in a job of its own.
"""

import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.soak import agent
from launch.soak.check import outcome_of, problems
from launch.soak.faults import FAULTS, Target, trainers_of
from launch.soak.soak import AGENT
from megatron_tn.training.run_folder import RunFolder
from tests.slurm.cluster import ROOT, Cluster, Job, clean_environment, wait_for
from tests.slurm.nodes import crash, fill, free, revive

pytestmark = pytest.mark.slurm
NODES = 4
STEPS = 60
WORDS = {
    "data.global_batch": 4,
    "schedule.steps": STEPS,
    "checkpoint.every": 5,
    "checkpoint.keep": 3,
    "hang_timeout_s": 30,  # a step takes so long where other work shares the cores
    "distributed_timeout_s": 120,
}


@dataclass
class Running:
    """A job whose trainers train."""

    cluster: Cluster
    job: Job
    folder: RunFolder
    disk: Path

    @property
    def target(self) -> Target:
        return Target(self.folder, trainers_of(self.folder.path), random.Random(0))

    def step(self) -> int:
        records = self.folder.records("loss")
        return records[-1]["step"] if records else 0

    def saved(self) -> int:
        """The newest checkpoint's step."""
        return max(self.folder.saved(), default=0)

    def starts(self) -> int:
        """How often the job was started."""
        return len(re.findall(r", restart \d+: ", self.job.output()))

    def wait_for_output(self, words: str) -> None:
        before = self.job.output().count(words)
        self.job.wait_for(lambda: self.job.output().count(words) > before)


@dataclass(frozen=True)
class Case:
    """inject: does it, and takes it back where it does not last. codes: exit codes of which train.sbatch names one;
    empty where the trainers go on, or the job's shell may end without a word. restarts: of the job by it. words: of
    training."""

    inject: Callable[[Running], None]
    codes: tuple[int, ...] = ()
    restarts: int = 1
    words: tuple[str, ...] = ()


def of_soak(name: str, *words: str) -> Case:
    return Case(lambda running: FAULTS[name].inject(running.target), FAULTS[name].ends, words=words)


def time_limit(running: Running) -> None:
    """The limit comes near while the trainers stand still, so that it does so before they are done."""
    running.target.signal_all(signal.SIGSTOP)
    hours, minutes, _ = running.job.field("RunTime").split(":")
    limit = 60 * int(hours) + int(minutes) + 2
    running.cluster.call("scontrol", "update", f"JobId={running.job.id}", f"TimeLimit={limit}")
    running.wait_for_output("SIGUSR1")
    running.cluster.call("scontrol", "update", f"JobId={running.job.id}", "TimeLimit=UNLIMITED")
    running.target.signal_all(signal.SIGCONT)


def requeue(running: Running) -> None:
    running.cluster.call("scontrol", "requeue", running.job.id)


def node_crash(running: Running) -> None:
    crash(running.cluster, "node3")
    time.sleep(3)
    revive(running.cluster, "node3")


def first_node_crash(running: Running) -> None:
    """The one that the job's shell is on: SLURM alone can requeue the job."""
    crash(running.cluster, "node1")
    time.sleep(3)
    revive(running.cluster, "node1")


def node_crash_in_a_save(running: Running) -> None:
    os.kill(running.target.pids[2], agent.SLOW_SAVE)
    running.job.wait_for(lambda: list(running.folder.checkpoints.glob("step_*.tmp")))
    time.sleep(1)  # the other ranks' files are there by now
    assert list(running.folder.checkpoints.glob("step_*.tmp/*"))
    node_crash(running)


def full_disk(running: Running, leave: int = 0, words: str = "log.jsonl cannot be written") -> None:
    fill(running.disk, leave)
    try:
        running.wait_for_output(words)
    finally:
        free(running.disk)


def no_checkpoint_fits(running: Running) -> None:
    full_disk(running, 40_000, "could not be written")


def read_only(running: Running) -> None:
    target = running.target
    FAULTS["readonly"].inject(target)
    running.wait_for_output("could not be written")
    FAULTS["readonly"].heal(target)


def nothing(running: Running) -> None:
    """The fault is there from the beginning."""


NO_WANDB = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}  # nobody listens there
UNREACHABLE = ("logging=wandb", "logging.wandb.mode=online", "distributed_timeout_s=600")  # wandb tries for 90 s
CASES = {
    "time limit": Case(time_limit, (0,), words=("hang_timeout_s=600", "distributed_timeout_s=900")),
    "SIGTERM": of_soak("term"),
    "scontrol requeue": Case(requeue),
    "task killed": of_soak("kill"),
    "segmentation fault": of_soak("segv"),
    "exception": of_soak("exception"),
    "Python's lock": of_soak("lock", "hang_timeout_s=15"),
    "SIGSTOP": of_soak("stop", "hang_timeout_s=15"),
    "collective aborted": of_soak("abort"),
    "node crash": Case(node_crash, FAULTS["kill"].ends),
    "first node crash": Case(first_node_crash),
    "node crash in a save": Case(node_crash_in_a_save, FAULTS["kill"].ends),
    "no room for a checkpoint": Case(no_checkpoint_fits, restarts=0),
    "full disk": Case(full_disk, restarts=0),
    "read-only folder": Case(read_only, restarts=0),
    "wandb unreachable": Case(nothing, restarts=0, words=UNREACHABLE),
    "damaged checkpoint": of_soak("damage"),
}
TOGETHER = ("segmentation fault", "node crash in a save", "full disk", "damaged checkpoint")


@pytest.fixture(scope="module")
def words(training) -> list[str]:
    kept = [word for word in training if word.partition("=")[0] not in WORDS]
    return [*kept, *(f"{name}={value}" for name, value in WORDS.items())]


@pytest.fixture(scope="module")
def undisturbed(words, tmp_path_factory) -> RunFolder:
    folder = RunFolder(tmp_path_factory.mktemp("undisturbed") / "run")
    command = [ROOT / "launch/local.sh", "-n", str(NODES), *words, f"run_dir={folder}"]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def start(cluster, words, undisturbed) -> Iterator[Callable[[Case], Running]]:
    """start(CASE): its job, on four nodes, with run_dir on the small disk."""
    started: list[Running] = []
    disk = cluster.base / "disk"

    def submit(case: Case) -> Running:
        folder = RunFolder(disk / "run")
        log = cluster.folder / f"fault-{time.monotonic_ns()}.log"
        log.touch()
        path = f"{AGENT}:{ROOT}:{os.environ.get('PYTHONPATH', '')}"
        variables = {"PYTHONPATH": path, "MEGATRON_TN_SRUN_S": 20, **NO_WANDB}
        exports = ",".join(["--export=ALL", *(f"{name}={value}" for name, value in variables.items())])
        options = ["--parsable", f"--nodes={NODES}", f"--output={log}", exports]
        script = str(ROOT / "launch/train.sbatch")
        number = cluster.call("sbatch", *options, script, *words, *case.words, f"run_dir={folder}")
        started.append(Running(cluster, Job(cluster, number, log), folder, disk))
        return started[0]

    yield submit
    for running in started:
        if not running.job.ended():
            subprocess.run(["scancel", "--signal=KILL", "--full", running.job.id], env=environment_of(cluster))
            running.cluster.call("scancel", running.job.id)
        subprocess.run(["rm", "-rf", *map(str, disk.iterdir())], check=True)


def environment_of(cluster: Cluster) -> dict[str, str]:
    return clean_environment(SLURM_CONF=str(cluster.base / "slurm.conf"))


def do(case: Case, running: Running) -> None:
    """Wait until the trainers have a new checkpoint and train on, inject the fault, and check how the start ended."""
    job, ends, saved = running.job, len(running.job.ends()), running.saved()
    job.wait_for(lambda: running.saved() > saved and len(running.folder.saved()) > 1, 240)
    job.wait_for(lambda: running.step() > running.saved())
    assert len(trainers_of(running.folder.path)) == NODES
    starts = running.starts()
    case.inject(running)
    if case.restarts:
        job.wait_for(lambda: running.starts() > starts, 240)
    codes = [int(re.search(r"exit code (\d+)", line)[1]) for line in job.ends()[ends:]]
    if case.codes or not case.restarts:
        assert len(codes) == bool(case.codes), job.output()
        assert not codes or codes[0] in case.codes, job.output()


def check(running: Running, undisturbed: RunFolder, restarts: int) -> None:
    job = running.job
    job.wait_for_end(300)
    fields = (job.field("JobState"), job.field("ExitCode"), job.field("Restarts"))
    assert fields == ("COMPLETED", "0:0", str(restarts)), job.output()
    assert outcome_of(undisturbed).step == STEPS
    assert problems(outcome_of(running.folder), outcome_of(undisturbed)) == [], job.output()
    idle = ["sinfo", "--noheader", "--Node", "--states=idle", "--format=%N"]
    wait_for(lambda: len(set(running.cluster.call(*idle).split())) == NODES, 60, job.as_it_is)


def test_four_faults_in_one_job(start, undisturbed):
    running = start(Case(nothing))
    for name in TOGETHER:
        do(CASES[name], running)
    check(running, undisturbed, sum(CASES[name].restarts for name in TOGETHER))


@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
def test_fault(start, undisturbed, name):
    case = CASES[name]
    running = start(case)
    if case.inject is not nothing:
        do(case, running)
    check(running, undisturbed, case.restarts)
