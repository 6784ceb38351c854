"""Predicted time of a step, from what a microbatch takes (microbatch.py), the step's traffic (traffic.py) and the rates
of conf/cluster.

    microbatch = FLOPs / matrix rate + bytes / memory bandwidth + exposed collectives
    step       = microbatches x microbatch + exposed reductions + update

Constants were fitted to the rows of docs/measurements (1, 2 and 4 GPUs); tests/planning/test_speed.py compares them.
"""

import bisect
import math
from dataclasses import dataclass

from megatron_tn.config import ClusterConfig, TrainConfig
from megatron_tn.model.registry import parameter_count
from megatron_tn.planning.microbatch import Microbatch
from megatron_tn.planning.muon import ELEMENT_BYTES, EQUAL_NORMS_BYTES, ITERATION_RATE, matrix_elements, most_work
from megatron_tn.planning.traffic import (
    LAST_BACKWARD,
    LAYER,
    MICROBATCH,
    Traffic,
    gathers,
    microbatches_of,
    spans_of,
    step_traffic,
)

MEMORY_SHARE = 0.88  # share of the datasheet's bandwidth that a device copy reaches (4.23 of 4.8 TB/s on an H200)
# A collective beside products takes multiprocessors and memory bandwidth from them: it costs this share of its
# time over NVLink, though it is hidden.
CONTENTION = 0.85
UPDATE_BYTES = 34  # per parameter: AdamW's kernel 30 (docs/performance.md), the gradient norm 4
BACKWARD = 2 / 3  # the backward pass's share of a microbatch's time


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on a rank, by kind; and its tokens per GPU."""

    products: float
    memory: float
    tensor_parallel: float
    data_parallel: float
    update: float
    tokens_per_gpu: float

    @property
    def kinds(self) -> dict[str, float]:
        return {
            "matrix products": self.products,
            "norms, gates, attention, copies": self.memory,
            "tensor and context parallel, exposed": self.tensor_parallel,
            "data parallel, exposed": self.data_parallel,
            "update": self.update,
        }

    @property
    def passes(self) -> float:
        """Seconds without the update: "step" of docs/performance.md; `total` is its "step + optimizer"."""
        return self.total - self.update

    @property
    def total(self) -> float:
        return sum(self.kinds.values())

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of one GPU."""
        return self.tokens_per_gpu / self.total

    def utilisation(self, config: TrainConfig) -> float:
        """6 x parameters x tokens/s of a GPU, over the datasheet's bf16 peak, as in docs/performance.md."""
        return 6 * parameter_count(config.model) * self.tokens_per_second / (config.cluster.bf16_tflops * 1e12)


def missing_rates(cluster: ClusterConfig) -> list[str]:
    """Settings of the cluster that a time needs and that are not known."""
    needed = ("bf16_tflops", "memory_bandwidth_gbs", "interconnect_gbs", "nvlink_gbs", "matrix_rates")
    return [f"cluster.{name}" for name in needed if not getattr(cluster, name)]


def matrix_rate(cluster: ClusterConfig, size: int) -> float:
    """FLOP/s of a matrix product whose smallest dimension is `size`: `cluster.matrix_rates`, interpolated, and below
    the first pair in proportion."""
    sizes, rates = zip(*cluster.matrix_rates, strict=True)
    at = bisect.bisect(sizes, size)
    if at == 0:
        rate = rates[0] * size / sizes[0]
    elif at == len(sizes):
        rate = rates[-1]
    else:
        share = (size - sizes[at - 1]) / (sizes[at] - sizes[at - 1])
        rate = rates[at - 1] + share * (rates[at] - rates[at - 1])
    return 1e12 * rate


def step_time(config: TrainConfig, world_size: int, work: Microbatch) -> StepTime:
    """The predicted time of a step; `missing_rates(config.cluster)` must be empty."""
    cluster, data = config.cluster, config.data
    bandwidth = MEMORY_SHARE * cluster.memory_bandwidth_gbs * 1e9
    microbatches = microbatches_of(config, world_size)
    products = microbatches * sum(flops / matrix_rate(cluster, size) for size, flops in work.products.items())
    memory = microbatches * (work.moved + engine_bytes(config, world_size)) / bandwidth
    traffic = step_traffic(config, world_size, work)
    layers = sum(exposed(each, cluster, 0.0) for each in traffic if each.beside == LAYER)
    passes = products + memory + layers
    windows = {MICROBATCH: passes, LAST_BACKWARD: BACKWARD * passes / microbatches}
    others = sum(exposed(each, cluster, windows.get(each.beside)) for each in traffic if each.beside in windows)
    published = sum(duration(each, cluster) for each in traffic if each.beside not in (LAYER, *windows))
    update = updated_bytes(config, world_size) / bandwidth + published
    if config.optim.name == "muon":
        iterations = most_work(config, world_size).products
        update += sum(flops / matrix_rate(cluster, size) for size, flops in iterations.items()) / ITERATION_RATE
    tokens = data.global_batch * data.sequence_length / world_size
    return StepTime(products, memory, layers, others, update, tokens)


def duration(traffic: Traffic, cluster: ClusterConfig) -> float:
    """Seconds of a collective that nothing runs beside. The links work at once; the slower one decides."""
    links = max(traffic.nvlink / cluster.nvlink_gbs, traffic.network / cluster.interconnect_gbs) / 1e9
    return links + traffic.calls * cluster.latency_us * 1e-6


def exposed(traffic: Traffic, cluster: ClusterConfig, window: float) -> float:
    """Seconds that a collective adds to the products it runs beside, which take `window` seconds: its CONTENTION with
    them, and what the network has left when they are done."""
    alone = (traffic.nvlink + traffic.network) / cluster.nvlink_gbs / 1e9 + traffic.calls * cluster.latency_us * 1e-6
    contention = CONTENTION * alone
    if not traffic.network:
        return contention
    return contention + max(duration(traffic, cluster) - window - contention, 0.0)


def updated_bytes(config: TrainConfig, world_size: int) -> float:
    """Bytes that an update moves, of the parameters that a rank updates: of its tensor-parallel part all, or with ZeRO
    and FSDP2 its share. Muon's iterations are products. Weights that are kept in fp8 are cast by a pass of their own,
    and read twice and written in one order or both on every rank."""
    size, quantised = UPDATE_BYTES * parameter_count(config.model), 0
    engine = config.engine
    if config.optim.name == "muon":
        element = ELEMENT_BYTES + (EQUAL_NORMS_BYTES if config.optim.equal_norms else 0)
        size += (element - UPDATE_BYTES) * matrix_elements(config.model)
    if engine.frees_weights:
        size += 4 * matrix_elements(config.model)
        quantised = (6 if engine.keeps_fp8_transposes else 5) * matrix_elements(config.model) / config.parallel.tp
    ranks = math.prod(spans_of(config, world_size, "data")) if engine.shards_state else 1
    return quantised + size / config.parallel.tp / ranks


def engine_bytes(config: TrainConfig, world_size: int) -> float:
    """Bytes that an engine moves in a microbatch beside the model's operators.

    fp32 sums that products add to: read, 4 an element (their writing is part of the product's rate). DeepSpeed's own
    reduction, at stage 2: 25 (engine/deepspeed/stage3.py). ZeRO 3 and FSDP2, in each gather: FSDP2's cast of
    its shard, fp32 read and bf16 written; bf16 read and written from the gathered buffer to the weights. And of a
    gradient: bf16 read and fp32 written, sorted by rank.
    """
    engine = config.engine
    local = parameter_count(config.model) / config.parallel.tp
    if not engine.keeps_weights:
        cast = 6 / math.prod(spans_of(config, world_size, "data")) if engine.name == "fsdp2" else 0
        return local * (gathers(config) * (cast + 4) + 6)
    return local * (4 if engine.sums_own_gradients else 25)
