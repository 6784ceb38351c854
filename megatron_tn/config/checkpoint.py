"""The settings `checkpoint.*`: when to save, which checkpoints to keep, and from which one to resume."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from megatron_tn.config.bounds import Count
from megatron_tn.config.mapping import STRICT


@dataclass(frozen=True, config=STRICT)
class CheckpointConfig:
    """A checkpoint stays if any of keep, keep_every and keep_best keeps it."""

    every: Count = 500  # steps; 0 saves only at the end and on preemption
    at_end: bool = True  # save when the run ends; False is for benchmarks
    keep: Count = 3  # the newest so many; 0 keeps all
    keep_every: Count = 0  # those at multiples of so many steps; 0: none for that
    keep_best: Count = 0  # so many with the lowest held-out loss, of those evaluated at the step that was saved
    # Write while training goes on. Costs host memory for one copy of what the rank owns (12 bytes a parameter without
    # ZeRO). On by default: while a step waits for a shared file system, every GPU stands still.
    async_save: bool = True
    on_failure: Literal["report", "abort"] = "report"  # of a save that failed; the last save of a run always aborts
    # auto: the newest whole checkpoint in run_dir; none: start afresh; a step in run_dir; a path.
    resume: int | str = "auto"
