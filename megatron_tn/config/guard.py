"""The settings `guard.*`: what happens when a step goes wrong."""

from typing import Annotated, Literal

from pydantic.dataclasses import dataclass

from megatron_tn.config.bounds import MOST_INT, Bounds, Count, Positive, Unlimited
from megatron_tn.config.mapping import STRICT


@dataclass(frozen=True, config=STRICT)
class GuardConfig:
    """All ranks decide the same, from numbers that were reduced over all of them. docs/checkpoints.md: rewinds."""

    # What follows a step whose loss or gradient norm is not finite. Its update is never applied. skip: go on with the
    # next batch; rewind: load the newest checkpoint and skip this batch from then on; abort: end the run.
    nonfinite: Literal["skip", "rewind", "abort"] = "skip"
    max_consecutive: Positive = 10  # number of consecutive non-finite steps that ends the run
    # A loss is a spike when it exceeds the median of the last spike_window losses by spike_sigmas standard deviations
    # (1.4826 x the median absolute deviation, which a spike does not move) and by spike_nats.
    spike: Literal["off", "report", "rewind", "abort"] = "report"
    spike_window: Annotated[int, Bounds(2, MOST_INT)] = 128  # losses; detection begins after half a window
    spike_sigmas: Unlimited = 8.0  # robust standard deviations above the median
    spike_nats: Unlimited = 0.5  # nats above the median; a spike exceeds both thresholds
    skip_before: Count = 0  # batches before the bad batch that a rewind skips as well
    max_rewinds: Count = 5  # number of rewinds of a run; the next one ends the run instead
