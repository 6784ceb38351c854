"""The settings `checkpoint.*`: when to save, which checkpoints to keep, and from which one to resume."""

from typing import Literal

from pydantic.dataclasses import dataclass

from megatron_tn.config.bounds import Count
from megatron_tn.config.mapping import STRICT


@dataclass(frozen=True, config=STRICT)
class CheckpointConfig:
    """A checkpoint stays if any of keep, keep_every and keep_best keeps it."""

    every: Count = 500  # steps between checkpoints; 0: only at the end of the run and on preemption
    at_end: bool = True  # whether to save when the run ends; False is for benchmarks
    keep: Count = 3  # number of newest checkpoints to keep; 0: all
    keep_every: Count = 0  # keep the checkpoints whose step is a multiple of this; 0: this rule keeps none
    # Number of checkpoints with the lowest held-out loss to keep, among those of steps that were also evaluated.
    keep_best: Count = 0
    # Write checkpoint files in a background thread while training goes on. Needs host memory for one copy of the
    # masters and moments that the rank owns (12 bytes a parameter without ZeRO); a resume reads its checkpoint into it
    # while the model is built.
    async_save: bool = True
    # After a failed save: log it and train on, or end the run. A failed last save always ends the run with an error.
    on_failure: Literal["report", "abort"] = "report"
    # Checkpoint to resume from. auto: the newest complete one in run_dir; none: start a new run; N: step N in run_dir;
    # or the path of a checkpoint.
    resume: int | str = "auto"
    # Whether to read all of that checkpoint and compare it with the hashes that were saved with it. The ranks share the
    # reading. Where bytes have changed, the checkpoint before it is taken.
    verify: bool = True
