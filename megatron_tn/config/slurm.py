"""The settings `slurm.*` of `python -m launch.submit`: what a job asks SLURM for, and when it is requeued."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic.dataclasses import dataclass

from megatron_tn.config.bounds import Bounds, Count, Positive, out_of_bounds
from megatron_tn.config.mapping import STRICT
from megatron_tn.config.run import TrainConfig

MOST_CHAIN = 1000  # jobs; each names all before it, and SLURM keeps 10 000 jobs by default (MaxJobCount)
Chain = Annotated[int, Bounds(0, MOST_CHAIN)]
Utilisation = Annotated[float, Bounds(0, 1, above=True)]

# Options that the launcher writes itself -> the setting that says them.
OWN_OPTIONS = {
    "nodes": "nodes",
    "ntasks": "slurm.processes_per_node",
    "ntasks-per-node": "slurm.processes_per_node",
    "time": "slurm.time",
    "job-name": "slurm.job_name",
    "partition": "slurm.partition",
    "account": "slurm.account",
    "qos": "slurm.qos",
    "array": "slurm.at_once",
    "signal": "slurm.grace_s",
    "requeue": "slurm.requeue",
    "no-requeue": "slurm.requeue",
    "output": "run_dir",
    "wrap": "run_dir",
    "export": "slurm.environment",
}
VARIABLE = re.compile(r"[A-Za-z_]\w*")
TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


@dataclass(frozen=True, config=STRICT)
class SlurmConfig:
    job_name: str = ""  # name of the job; empty: the name of run_dir's last folder
    # Time limit of one job in sbatch's form, 24:00:00 or 2-12:00:00; null: the cluster's default.
    time: str | None = None
    partition: str | None = None  # partition to submit to; null: the cluster's default
    account: str | None = None  # account that is charged; null: the user's default
    qos: str | None = None  # quality of service; null: the user's default
    gres: str = "gpu"  # name of the GPUs in --gres=NAME:cluster.gpus_per_node; empty: no --gres
    # Trainers on each node; 0: one for each of cluster.gpus_per_node, and one without GPUs.
    processes_per_node: Count = 0
    # true: the job has its nodes to itself (--exclusive); false: it may share them with other jobs.
    exclusive: bool = True
    # Further options of sbatch: ['--constraint=ib']; []: none.
    options: list[str] = dataclasses.field(default_factory=list)
    # Environment modules to load before training; []: none.
    modules: list[str] = dataclasses.field(default_factory=list)
    # Command that runs each node's trainers in a container: [apptainer, exec, --nv, image.sif]; []: no container.
    container: list[str] = dataclasses.field(default_factory=list)
    # Further options of srun: ['--container-image=...']; []: none.
    srun: list[str] = dataclasses.field(default_factory=list)
    # Environment variables of the job, added to those of the shell that submits:
    # +slurm.environment.NCCL_SOCKET_IFNAME=ib0.
    environment: dict[str, str | int] = dataclasses.field(default_factory=dict)
    grace_s: Positive = 120  # seconds before the time limit at which trainers are told to save and stop
    requeue: bool = True  # true: a job that reached its time limit, or failed, goes back into the queue; false: it ends
    # A job gives up after this many requeues in a row without a new checkpoint; 0: a failed job is not requeued.
    failures: Count = 3
    # Number of jobs submitted for one run, each to start after the one before; a job that finds the run at its last
    # step ends at once. 0: as many as the estimated time needs.
    chain: Chain = 1
    # afterany: each job of a chain waits for those before it; singleton: it waits for all of the user's jobs with the
    # same name.
    dependency: Literal["afterany", "singleton"] = "afterany"
    # Stop after the first step with which the run has read this many tokens, with the schedule of schedule.steps; 0:
    # stop at schedule.steps.
    tokens: Count = 0
    # Share of cluster.bf16_tflops that the run reaches, to estimate its time if other rates in cluster.* are unknown.
    utilisation: Utilisation = 0.4
    at_once: Count = 0  # tasks of a job array (a sweep) that may run at the same time; 0: no limit

    @property
    def seconds(self) -> int | None:
        """`time` in seconds; None where it is not set. Raises ValueError unless it is a time limit of sbatch."""
        if self.time is None:
            return None
        found = TIME.fullmatch(self.time)
        if not found:
            raise ValueError(
                f"slurm.time={self.time!r} is no time limit: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS"
            )
        days, *parts = found.groups()
        first, second, third = (int(part or 0) for part in parts)
        if days is not None:
            return int(days) * 86400 + first * 3600 + second * 60 + third
        if parts[2] is not None:
            return first * 3600 + second * 60 + third
        return first * 60 + second

    def words(self) -> Iterator[tuple[str, str]]:
        """(setting, value) of every text that becomes a word of the job's script."""
        for name in ("job_name", "time", "partition", "account", "qos", "gres"):
            if (value := getattr(self, name)) is not None:
                yield f"slurm.{name}", value
        for name in ("options", "modules", "container", "srun"):
            for value in getattr(self, name):
                yield f"slurm.{name}", value
        for key, value in self.environment.items():
            yield f"slurm.environment.{key}", str(value)

    def problems(self) -> list[str]:
        """One line for each setting that is out of bounds, that no script can hold, or that contradicts another."""
        found = list(out_of_bounds(self, "slurm.").values())
        found += [
            f"{name}={value!r}: a backslash or a control character in it cannot stand in a job script"
            for name, value in self.words()
            if "\\" in value or not value.isprintable()
        ]
        for option in self.options:
            name = option.removeprefix("--").partition("=")[0]
            if not option.startswith("--"):
                found.append(f"slurm.options: {option!r} must be a long option, such as --constraint=ib")
            elif name in OWN_OPTIONS or (name == "dependency" and self.chain != 1):
                found.append(f"slurm.options: {option!r} is written by {OWN_OPTIONS.get(name, 'slurm.chain')}")
        found += [f"slurm.srun: {word!r} must be an option of srun" for word in self.srun if not word.startswith("-")]
        found += [
            f"slurm.environment: {name!r} is no name of a variable"
            for name in self.environment
            if not VARIABLE.fullmatch(name)
        ]
        try:
            if (seconds := self.seconds) is not None and seconds <= self.grace_s:
                found.append(
                    f"slurm.time={self.time} must be longer than slurm.grace_s={self.grace_s} s: the trainers would be "
                    "told to stop as soon as they start"
                )
        except ValueError as error:
            found.append(str(error))
        return found


@dataclass(frozen=True, config=STRICT)
class SubmitConfig(TrainConfig):
    """`python -m launch.submit`: a run's settings, and its job's."""

    dry_run: bool = False  # write and show everything, and do not submit
    slurm: SlurmConfig = dataclasses.field(default_factory=SlurmConfig)

    @property
    def processes_per_node(self) -> int:
        return max(self.slurm.processes_per_node or self.cluster.gpus_per_node, 1)

    @property
    def world_size(self) -> int:
        """Number of processes; 0 where `nodes` is out of bounds."""
        return max(self.nodes, 0) * self.processes_per_node

    @property
    def train(self) -> TrainConfig:
        """The run's settings alone."""
        names = [field.name for field in dataclasses.fields(TrainConfig)]
        return TrainConfig(**{name: getattr(self, name) for name in names})

    def problems(self, world_size: int | None = None) -> list[str]:
        return list(dict.fromkeys([*super().problems(world_size), *self.slurm.problems()]))
