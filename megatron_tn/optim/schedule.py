"""Learning rate and batch of a step, as pure functions of the step: nothing to save, nothing to drift on resume."""

from __future__ import annotations

import math

from megatron_tn.config import OptimConfig, ScheduleConfig


def learning_rate(step: int, optim: OptimConfig, schedule: ScheduleConfig) -> float:
    """Rate of optimizer step `step`, counted from 0.

    Warm-up is linear and ends at the peak. cosine then falls to min_lr_ratio x peak at the last step; wsd
    (warm-up-stable-decay, arXiv 2404.06395) stays at the peak and falls linearly over the last decay_fraction of the
    steps; constant stays.
    """
    if step < schedule.warmup_steps:
        return optim.lr * (step + 1) / schedule.warmup_steps
    floor = schedule.min_lr_ratio
    if schedule.name == "constant":
        factor = 1.0
    elif schedule.name == "cosine":
        span = max(schedule.steps - 1 - schedule.warmup_steps, 1)
        progress = min((step - schedule.warmup_steps) / span, 1.0)
        factor = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    else:
        decay_steps = max(round(schedule.decay_fraction * schedule.steps), 1)
        left = max(schedule.steps - 1 - step, 0)
        factor = floor + (1 - floor) * min(left / decay_steps, 1.0)
    return optim.lr * factor


def batch_of_step(step: int, global_batch: int) -> tuple[int, int]:
    """(first sample, number of samples) of optimizer step `step`. The one place a batch-size ramp would change."""
    return step * global_batch, global_batch
