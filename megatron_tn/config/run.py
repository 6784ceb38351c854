"""The settings of a whole training run."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from pydantic.dataclasses import dataclass

from megatron_tn.config.bounds import Bounds, Count, Seed
from megatron_tn.config.checkpoint import CheckpointConfig
from megatron_tn.config.cluster import ClusterConfig
from megatron_tn.config.data import DataConfig
from megatron_tn.config.engine import EngineConfig
from megatron_tn.config.evaluation import EvaluationConfig
from megatron_tn.config.guard import GuardConfig
from megatron_tn.config.logging import LoggingConfig
from megatron_tn.config.mapping import STRICT, from_mapping, read_mapping
from megatron_tn.config.model import ModelConfig
from megatron_tn.config.optim import OptimConfig
from megatron_tn.config.parallel import ParallelConfig
from megatron_tn.config.relations import run_problems
from megatron_tn.config.schedule import ScheduleConfig


@dataclass(frozen=True, config=STRICT)
class TrainConfig:
    """`python -m megatron_tn.train` writes it, resolved, to run_dir/config.json."""

    # Folder of the run's files; a run that exists there is resumed, see checkpoint.resume.
    run_dir: str = "runs/default"
    # Initial weights of a new run: a checkpoint, a run's folder or a released model's folder; empty: random values.
    init_from: str = ""
    seed: Seed = 0  # seed of the random initial weights and of the data order
    nodes: Annotated[int, Bounds(1, 1_000_000)] = 1  # number of nodes that the run is planned for and submitted to
    # Save a checkpoint and end after this step, with the learning-rate schedule of schedule.steps; 0: end at
    # schedule.steps.
    stop_after: Count = 0
    # true: bitwise reproducible kernels, which are slower; false: sums may differ in order from run to run.
    deterministic: bool = False
    # Seconds that a collective waits for other ranks before it fails. Must exceed the time of start-up, of compilation
    # and of an evaluation.
    distributed_timeout_s: Annotated[int, Bounds(1, 1_000_000_000)] = 1800
    # Seconds that a rank may stay in one phase of a step; then the run ends and names the rank that the others wait
    # for. 0: no such watch.
    hang_timeout_s: Count = 600
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    logging: LoggingConfig = dataclasses.field(default_factory=LoggingConfig)
    cluster: ClusterConfig = dataclasses.field(default_factory=ClusterConfig)

    @property
    def last_step(self) -> int:
        """The step after which this process is done."""
        return min(self.stop_after or self.schedule.steps, self.schedule.steps)

    def problems(self, world_size: int | None = None) -> list[str]:
        """Every bound and every relation between settings that does not hold, one line each.

        world_size: number of processes; without it the relations to it are left out.
        """
        return run_problems(self, world_size)

    def job_problems(self) -> list[str]:
        """What refuses a sweep that has this job, before its first job starts."""
        return self.problems()


def load(path: Path, kind: type = TrainConfig) -> Any:
    """Read a config written by `save`. Raises ConfigError."""
    return from_mapping(kind, read_mapping(path))
