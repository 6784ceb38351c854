"""The settings `logging.*`: what a run records, and where."""

from __future__ import annotations

import dataclasses
from typing import Literal

from pydantic.dataclasses import dataclass

from megatron_tn.config.bounds import Count, Positive
from megatron_tn.config.mapping import STRICT


@dataclass(frozen=True, config=STRICT)
class WandbConfig:
    mode: Literal["online", "offline", "disabled"] = "offline"
    project: str = "megatron_tn"  # of wandb
    entity: str | None = None  # wandb's user or team; null: the one that is logged in


@dataclass(frozen=True, config=STRICT)
class LoggingConfig:
    every: Positive = 1  # steps between records of log.jsonl
    progress: bool = True  # progress bar on rank 0, and a table of the run at its start and at its end
    summary: bool = True  # loss.png and the table at the run's end
    ranks_every: Count = 100  # steps between reports of each rank's speed and peak memory; 0: none
    profile: bool = False  # write rank 0's Chrome trace and table of kernels to run_dir/profile
    profile_skip: Count = 10  # steps of this process before the first profiled one
    profile_steps: Positive = 3  # profiled steps
    wandb: WandbConfig = dataclasses.field(default_factory=WandbConfig)
