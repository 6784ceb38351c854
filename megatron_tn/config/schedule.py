"""The settings `schedule.*`: learning rate and batch size by optimizer step."""

from typing import Literal

from pydantic.dataclasses import dataclass

from megatron_tn.config.bounds import Count, Positive, Share
from megatron_tn.config.mapping import STRICT


@dataclass(frozen=True, config=STRICT)
class ScheduleConfig:
    """`megatron_tn.optim.schedule` has the formulas."""

    name: Literal["cosine", "wsd", "constant"] = "cosine"  # shape of the learning-rate schedule after warm-up
    steps: Positive = 1000  # optimizer steps of the whole run
    warmup_steps: Count = 100  # steps over which the learning rate rises linearly to optim.lr
    decay_fraction: Share = 0.2  # wsd: share of schedule.steps, at the end, over which the learning rate falls
    min_lr_ratio: Share = 0.1  # learning rate of the last step / optim.lr
    # Batch-size ramp: the batch of the first step, in sequences. It grows to data.global_batch in increments spread
    # evenly over the first ramp_steps steps. 0: no ramp.
    ramp_from: Count = 0
    ramp_increment: Count = 0  # sequences of one increment of the batch-size ramp
    ramp_steps: Count = 0  # steps of the batch-size ramp

    @property
    def decay_steps(self) -> int:
        """wsd: steps at the end over which the rate falls; at least one where decay_fraction > 0."""
        return max(round(self.decay_fraction * self.steps), 1) if self.decay_fraction > 0 else 0
