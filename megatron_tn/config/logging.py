"""The settings `logging.*`: what a run records, and where."""

import dataclasses
from typing import Literal

from pydantic.dataclasses import dataclass

from megatron_tn.config.bounds import Count, Positive
from megatron_tn.config.mapping import STRICT


@dataclass(frozen=True, config=STRICT)
class WandbConfig:
    # online: upload while training; offline: write wandb's files to the run's folder, for python -m launch.sync;
    # disabled: no wandb.
    mode: Literal["online", "offline", "disabled"] = "offline"
    project: str = "megatron_tn"  # name of the wandb project
    entity: str | None = None  # wandb user or team; null: the logged-in user


@dataclass(frozen=True, config=STRICT)
class LoggingConfig:
    every: Positive = 1  # steps between records of log.jsonl; the last step and evaluated steps have a record, too
    progress: bool = True  # show a progress bar on rank 0, and a table of the run when it starts and ends
    summary: bool = True  # when the run ends, write run_dir/loss.png and print the table of the run
    # Steps between records of every rank's speed and peak memory in log.jsonl; 0: no such records.
    ranks_every: Count = 100
    profile: bool = False  # profile rank 0: write a Chrome trace and a table of kernels to run_dir/profile
    profile_skip: Count = 10  # steps after the start of the process that are not profiled
    profile_steps: Positive = 3  # number of profiled steps, after logging.profile_skip
    tensorboard: bool = False  # write run_dir/tensorboard for TensorBoard; needs pip install -e '.[tensorboard]'
    wandb: WandbConfig = dataclasses.field(default_factory=WandbConfig)
