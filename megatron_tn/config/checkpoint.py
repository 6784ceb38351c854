"""The settings `checkpoint.*`: when to save, which checkpoints to keep, and from which one to resume."""

from typing import Literal

from pydantic.dataclasses import dataclass

from megatron_tn.config.bounds import Count
from megatron_tn.config.mapping import STRICT


@dataclass(frozen=True, config=STRICT)
class CheckpointConfig:
    """A checkpoint stays if any of keep, keep_every and keep_best keeps it."""

    every: Count = 500  # steps between checkpoints; 0: save only at the end of the run and on preemption
    at_end: bool = True  # save a checkpoint when the run ends; false is for benchmarks
    keep: Count = 3  # number of newest checkpoints that are kept; older ones are removed. 0: all are kept
    keep_every: Count = 0  # N: also keep checkpoints whose step is a multiple of N; 0: none besides
    # Also keep this many checkpoints with the lowest held-out loss, among those of evaluated steps; 0: none besides.
    keep_best: Count = 0
    # true: a background thread writes checkpoint files while training goes on. This takes host memory for one copy of
    # the rank's own masters and moments (12 bytes a parameter without ZeRO). false: training waits until the files are
    # written.
    async_save: bool = True
    # after a failed save: report: log the error and train on; abort: end the run. If the last save of a run fails, the
    # run ends with an error in either case.
    on_failure: Literal["report", "abort"] = "report"
    # Checkpoint to resume from. auto: the newest complete one in run_dir, or a new run if there is none; none: start a
    # new run; N: step N in run_dir; or the path of a checkpoint.
    resume: int | str = "auto"
    # true: before resuming, read the whole checkpoint (each rank a part) and compare it with its stored hashes; a
    # damaged checkpoint is skipped, and the one before it is taken. false: trust the files.
    verify: bool = True
