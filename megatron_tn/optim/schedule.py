"""Learning rate and batch of a step, as pure functions of the step number: no state in checkpoints."""

import math

from megatron_tn.config import OptimConfig, ScheduleConfig


def learning_rate(step: int, optim: OptimConfig, schedule: ScheduleConfig) -> float:
    """Rate of optimizer step `step`, counted from 0.

    Warm-up is linear and ends at the peak. cosine then falls to min_lr_ratio x peak at the last step; wsd
    (warm-up-stable-decay, arXiv 2404.06395) stays at the peak and falls linearly over the last decay_steps steps, to
    min_lr_ratio x peak at the last one, or not at all with decay_steps=0; constant stays at the peak.
    """
    if step < schedule.warmup_steps:
        return optim.lr * (step + 1) / schedule.warmup_steps
    floor = schedule.min_lr_ratio
    if schedule.name == "constant":
        factor = 1.0
    elif schedule.name == "cosine":
        span = schedule.steps - 1 - schedule.warmup_steps
        # span = 0: the only step after warm-up is the last and gets the floor; a run of one step gets the peak.
        progress = min((step - schedule.warmup_steps) / span, 1.0) if span > 0 else float(schedule.steps > 1)
        factor = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    else:
        left = max(schedule.steps - 1 - step, 0)
        share = min(left / schedule.decay_steps, 1.0) if schedule.decay_steps else 1.0
        factor = floor + (1 - floor) * share
    return optim.lr * factor


def batch_of_step(step: int, global_batch: int, schedule: ScheduleConfig) -> tuple[int, int]:
    """(first sample, number of samples) of optimizer step `step`, counted from 0.

    With a ramp the batch grows from schedule.ramp_from sequences to global_batch by increments of
    schedule.ramp_increment, spaced evenly over the first schedule.ramp_steps steps (as in arXiv 2005.14165, appendix
    B). The learning rate remains a function of the step.
    """
    if not schedule.ramp_from:
        return step * global_batch, global_batch
    sizes = range(schedule.ramp_from, global_batch, schedule.ramp_increment)
    first = 0
    for index, size in enumerate(sizes):
        begin, end = (-(-schedule.ramp_steps * i // len(sizes)) for i in (index, index + 1))
        if step < end:
            return first + (step - begin) * size, size
        first += (end - begin) * size
    return first + (step - schedule.ramp_steps) * global_batch, global_batch
