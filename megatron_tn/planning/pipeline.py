"""What pipeline parallelism would reach, for comparison: this package has none.

1F1B (arXiv 2104.04473, section 2.2) over p stages and m microbatches of a data-parallel rank, ZeRO 1 over the rest:

    step = (m + p - 1) x (a microbatch's time / p + head) + sending activations + reductions + update

of which p - 1 of m + p - 1 microbatches' times are the bubble. A stage keeps p microbatches of L / p layers: the
activations of one microbatch of all layers. The last stage has the head beside its layers, and the others wait for it.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_tn.config import TrainConfig
from megatron_tn.model.registry import forward_flops_per_token, parameter_count
from megatron_tn.planning.estimate import CUBLAS, GIB, SLACK
from megatron_tn.planning.microbatch import extrapolated_in_rows
from megatron_tn.planning.speed import BACKWARD, MEMORY_SHARE, UPDATE_BYTES, step_time
from megatron_tn.planning.traffic import received

STATE_BYTES, SHARDED_BYTES = 2 + 4, 4 + 8  # per parameter: weights + gradients; masters + moments


@dataclass(frozen=True)
class Pipeline:
    """stages: p. rows: sequences of a microbatch. bubble: share of the step."""

    stages: int
    rows: int
    recompute: str
    seconds: float
    tokens_per_second: float
    bubble: float
    memory: int


def best_pipeline(config: TrainConfig, world_size: int) -> Pipeline | None:
    """The fastest that fits, with config's tensor parallelism and batch; None where none does."""
    limit = config.cluster.gpu_memory_gib * GIB
    found = [each for each in _pipelines(config, world_size) if each.memory <= limit]
    return max(found, key=lambda each: each.tokens_per_second, default=None)


def _pipelines(config: TrainConfig, world_size: int) -> Iterator[Pipeline]:
    data, parallel = config.data, replace(config.parallel, cp=1)
    for stages, rows, policy in itertools.product((2, 4, 8, 16), (1, 2), ("none", "selective", "full")):
        ranks = parallel.tp * stages
        dp, rest = divmod(world_size, ranks)
        if rest or config.model.layers % stages or data.global_batch % (rows * dp) or not dp:
            continue
        engine = replace(config.engine, name="local", recompute=policy, recompute_every=1)
        variant = replace(config, parallel=parallel, engine=engine, data=replace(data, micro_batch=rows))
        yield _pipeline(variant, stages, dp)


def _pipeline(config: TrainConfig, stages: int, dp: int) -> Pipeline:
    model, data, cluster, tp = config.model, config.data, config.cluster, config.parallel.tp
    work = extrapolated_in_rows(config)
    one = step_time(replace(config, data=replace(data, global_batch=data.micro_batch)), tp, work)  # of one microbatch
    flops = forward_flops_per_token(model, data.sequence_length)
    head = one.products * flops["head"] / sum(flops.values())
    passes = one.products + one.memory + one.tensor_parallel
    slot = (passes - head) / stages + head
    tokens = data.micro_batch * data.sequence_length
    sent = 2 * 2 * tokens * model.embed_dim / tp / (cluster.interconnect_gbs * 1e9)  # bf16, forward and back
    microbatches = data.global_batch // (data.micro_batch * dp)
    local = math.ceil(parameter_count(model) / tp / stages)
    reduced, gathered = (
        received(kind, width * local, 1, dp)[1] / (cluster.interconnect_gbs * 1e9)
        for kind, width in (("reduce-scatter", 4), ("all-gather", 2))
    )
    update = UPDATE_BYTES * local / dp / (MEMORY_SHARE * cluster.memory_bandwidth_gbs * 1e9) + gathered
    seconds = (microbatches + stages - 1) * (slot + sent) + max(reduced - BACKWARD * slot, 0) + update
    allocated = local * (STATE_BYTES + SHARDED_BYTES / dp) + work.peak + CUBLAS
    memory = int((1 + SLACK) * allocated + cluster.outside_allocator_gib * GIB)
    rate = data.global_batch * data.sequence_length / seconds / (tp * stages * dp)
    bubble = (stages - 1) * (slot + sent) / seconds
    return Pipeline(stages, data.micro_batch, config.engine.recompute, seconds, rate, bubble, memory)
