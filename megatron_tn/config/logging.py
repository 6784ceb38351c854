"""The settings `logging.*`: what a run records, and where."""

import dataclasses
from typing import Literal

from pydantic.dataclasses import dataclass

from megatron_tn.config.bounds import Count, Positive
from megatron_tn.config.mapping import STRICT


@dataclass(frozen=True, config=STRICT)
class WandbConfig:
    mode: Literal["online", "offline", "disabled"] = "offline"
    project: str = "megatron_tn"  # name of the wandb project
    entity: str | None = None  # wandb user or team; null: the logged-in user


@dataclass(frozen=True, config=STRICT)
class LoggingConfig:
    every: Positive = 1  # steps between records of log.jsonl; the last step and those that are evaluated have one, too
    progress: bool = True  # show a progress bar on rank 0, and a table of the run when it starts and ends
    summary: bool = True  # write loss.png and print the table when the run ends
    ranks_every: Count = 100  # steps between records of every rank's speed and peak memory; 0: no such records
    profile: bool = False  # profile rank 0: write a Chrome trace and a table of kernels to run_dir/profile
    profile_skip: Count = 10  # steps of this process before the first profiled step
    profile_steps: Positive = 3  # number of profiled steps
    tensorboard: bool = False  # write run_dir/tensorboard for TensorBoard; needs the extra tensorboard
    wandb: WandbConfig = dataclasses.field(default_factory=WandbConfig)
