"""The settings `guard.*`: what happens when a step goes wrong."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic.dataclasses import dataclass

from megatron_tn.config.bounds import MOST_INT, Bounds, Count, Positive, Unlimited
from megatron_tn.config.mapping import STRICT


@dataclass(frozen=True, config=STRICT)
class GuardConfig:
    """All ranks decide the same, from numbers that were reduced over all of them.

    rewind: load the newest checkpoint and never train on the bad batch again (docs/checkpoints.md).
    """

    # A step whose loss or gradient is not finite. Its update is never applied; "skip" goes on with the next batch.
    nonfinite: Literal["skip", "rewind", "abort"] = "skip"
    max_consecutive: Positive = 10  # non-finite steps in a row after which the run aborts
    # A loss is a spike when it exceeds the median of the last spike_window losses by spike_sigmas standard deviations
    # (1.4826 x the median absolute deviation, which a spike does not move) and by spike_nats.
    spike: Literal["off", "report", "rewind", "abort"] = "report"
    spike_window: Annotated[int, Bounds(2, MOST_INT)] = 128  # steps; no step is a spike before half of them are known
    spike_sigmas: Unlimited = 8.0  # robust standard deviations above the median
    spike_nats: Unlimited = 0.5  # and at least so far above it
    skip_before: Count = 0  # batches before the bad one that a rewind skips too
    max_rewinds: Count = 5  # of a run, after which it aborts
