"""The settings `schedule.*`: learning rate and batch size by optimizer step."""

from typing import Literal

from pydantic.dataclasses import dataclass

from megatron_tn.config.bounds import Count, Positive, Share
from megatron_tn.config.mapping import STRICT


@dataclass(frozen=True, config=STRICT)
class ScheduleConfig:
    """`megatron_tn.optim.schedule` has the formulas."""

    # learning rate after warm-up. cosine: half a cosine down to min_lr_ratio; wsd: constant, then a decay; constant.
    name: Literal["cosine", "wsd", "constant"] = "cosine"
    steps: Positive = 1000  # optimizer steps of the whole run
    warmup_steps: Count = 100  # steps over which the learning rate rises linearly to optim.lr; 0: no warm-up
    # wsd: the learning rate falls over this share of schedule.steps, the last ones; 0: it does not fall.
    decay_fraction: Share = 0.2
    # cosine, and wsd with schedule.decay_fraction above 0: learning rate of the last step divided by optim.lr.
    min_lr_ratio: Share = 0.1
    # Batch-size ramp: sequences of the first step's batch, which grows to data.global_batch in increments spread evenly
    # over the first ramp_steps steps. 0: every step has data.global_batch.
    ramp_from: Count = 0
    ramp_increment: Count = 0  # batch-size ramp: sequences that each increment adds
    ramp_steps: Count = 0  # batch-size ramp: steps until the batch is data.global_batch

    @property
    def decay_steps(self) -> int:
        """wsd: steps at the end over which the rate falls; at least one where decay_fraction > 0."""
        return max(round(self.decay_fraction * self.steps), 1) if self.decay_fraction > 0 else 0
