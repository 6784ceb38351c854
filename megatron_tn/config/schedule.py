"""The settings `schedule.*`: learning rate and batch size by optimizer step."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from megatron_tn.config.bounds import Count, Positive, Share
from megatron_tn.config.mapping import STRICT


@dataclass(frozen=True, config=STRICT)
class ScheduleConfig:
    """`megatron_tn.optim.schedule` has the formulas."""

    name: Literal["cosine", "wsd", "constant"] = "cosine"
    steps: Positive = 1000  # optimizer steps of the whole run
    warmup_steps: Count = 100  # steps over which the rate rises to optim.lr
    decay_fraction: Share = 0.2  # wsd: share of the steps, at the end, over which the rate falls
    min_lr_ratio: Share = 0.1  # learning rate of the last step over that of the peak
    # Batch-size ramp: from ramp_from sequences to data.global_batch, by ramp_increment at a time, spread evenly over
    # the first ramp_steps steps. ramp_from=0: data.global_batch at every step.
    ramp_from: Count = 0
    ramp_increment: Count = 0  # sequences that the batch grows by
    ramp_steps: Count = 0  # steps over which it grows to data.global_batch

    @property
    def decay_steps(self) -> int:
        """wsd: steps at the end over which the rate falls; at least one where decay_fraction > 0."""
        return max(round(self.decay_fraction * self.steps), 1) if self.decay_fraction > 0 else 0
