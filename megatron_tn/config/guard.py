"""The settings `guard.*`: reaction to non-finite steps and to loss spikes."""

from typing import Annotated, Literal

from pydantic.dataclasses import dataclass

from megatron_tn.config.bounds import MOST_INT, Bounds, Count, Positive, Unlimited
from megatron_tn.config.mapping import STRICT


@dataclass(frozen=True, config=STRICT)
class GuardConfig:
    """All ranks decide the same, from numbers that were reduced over all of them. docs/checkpoints.md: rewinds."""

    # what follows a step whose loss or gradient norm is not finite; its update is never applied. skip: go on with the
    # next batch; rewind: load the newest checkpoint and skip this batch from then on; abort: end the run.
    nonfinite: Literal["skip", "rewind", "abort"] = "skip"
    max_consecutive: Positive = 10  # the run ends after this many non-finite steps in a row
    # what follows a loss spike: a loss that exceeds the median m of the last spike_window losses by spike_sigmas
    # standard deviations (taken as 1.4826 x median |loss - m|, which a spike does not move) and by spike_nats. off: no
    # detection; report: log it and train on; rewind, abort: as for nonfinite.
    spike: Literal["off", "report", "rewind", "abort"] = "report"
    # Number of last losses of which the median is taken; detection begins after half of them.
    spike_window: Annotated[int, Bounds(2, MOST_INT)] = 128
    # Least height of a spike above the median, in the standard deviations that guard.spike defines.
    spike_sigmas: Unlimited = 8.0
    spike_nats: Unlimited = 0.5  # least height of a spike above the median, in nats per token
    skip_before: Count = 0  # a rewind skips the bad batch and this many batches before it
    max_rewinds: Count = 5  # number of rewinds that the guard makes in a run; instead of another it ends the run
