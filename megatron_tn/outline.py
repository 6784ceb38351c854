"""Figures of a run before it is launched (tokens, FLOPs, memory, time, disk), which `python -m launch.submit` shows."""

import bisect
from dataclasses import dataclass

from megatron_tn.config import TrainConfig
from megatron_tn.model.registry import parameter_count, training_flops_per_token
from megatron_tn.optim.schedule import batch_of_step
from megatron_tn.planning.concerns import checkpoint_bytes, concerns
from megatron_tn.planning.estimate import MemoryPlan, plan_memory
from megatron_tn.planning.microbatch import microbatch
from megatron_tn.planning.speed import StepTime, missing_rates, step_time


@dataclass(frozen=True)
class Outline:
    """parameters: of the model. tokens_a_step: of a step after the batch-size ramp. tokens: of the steps after `step`
    up to last_step. flops: of `tokens`, forward and backward pass. memory: of the rank with the highest peak; None
    where the GPUs' memory is not known. time: of a step; None where the cluster's rates are not known. concerns:
    settings that are allowed but seldom intended."""

    parameters: int
    checkpoint_bytes: int
    tokens_a_step: int
    step: int
    last_step: int
    tokens: int
    flops: int
    world_size: int
    memory: MemoryPlan | None
    time: StepTime | None
    concerns: list[str]

    @property
    def planned_seconds(self) -> float | None:
        """Time of `tokens` by plan, without pauses, evaluations and failures."""
        return self.time and self.tokens / (self.time.tokens_per_second * self.world_size)

    def seconds(self, tflops: float) -> float:
        """Time of `flops` at a rate of all GPUs together."""
        return self.flops / (tflops * 1e12)


def outline(config: TrainConfig, world_size: int, step: int) -> Outline:
    """The outline of a run whose first `step` steps are done. `config.problems(world_size)` must be empty."""
    last = max(config.last_step, step)
    tokens = tokens_before(last, config) - tokens_before(step, config)
    gpus = config.cluster.gpu_memory_gib > 0
    time = step_time(config, world_size, microbatch(config)) if gpus and not missing_rates(config.cluster) else None
    return Outline(
        parameters=parameter_count(config.model),
        checkpoint_bytes=checkpoint_bytes(config),
        tokens_a_step=config.data.global_batch * config.data.sequence_length,
        step=step,
        last_step=last,
        tokens=tokens,
        flops=tokens * training_flops_per_token(config.model, config.data.sequence_length),
        world_size=world_size,
        memory=plan_memory(config, world_size) if gpus else None,
        time=time,
        concerns=list(concerns(config, time, environment={})) if config.cluster.gpus_per_node else [],
    )


def tokens_before(step: int, config: TrainConfig) -> int:
    """Tokens of the first `step` steps of the schedule."""
    return batch_of_step(step, config.data.global_batch, config.schedule)[0] * config.data.sequence_length


def step_with_tokens(tokens: int, config: TrainConfig) -> int | None:
    """The first step after which the run has read `tokens` tokens; None where schedule.steps steps read fewer."""
    steps = range(config.schedule.steps + 1)
    step = bisect.bisect_left(steps, tokens, key=lambda step: tokens_before(step, config))
    return step if step < len(steps) else None
