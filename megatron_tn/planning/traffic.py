"""Bytes that a rank receives in a step, by collective, over NVLink and over the network.

Of a tensor of S bytes, over a group of r ranks on each of k nodes, a rank receives in an all-gather or a
reduce-scatter

    over NVLink      S (r - 1) / r           the parts that arrive at the other ranks of its node
    over the network S (k - 1) / (k r)       its share of what arrives at its node: each GPU has a port of its own

and in an all-reduce, which is one of each, twice as much: NCCL's rings, as nccl-tests count bus bandwidth. An
all-to-all's bytes are counted piece by piece (planning/muon.py).
"""

import math
from dataclasses import dataclass

from megatron_tn.config import TrainConfig
from megatron_tn.engine.deepspeed.settings import zero3_live_parameters
from megatron_tn.model.registry import parameter_count
from megatron_tn.planning.microbatch import Microbatch
from megatron_tn.planning.muon import exchange, sharing

# What a collective runs beside, so that its time can be hidden.
NOTHING, LAYER, MICROBATCH, LAST_BACKWARD = "nothing", "a layer's products", "a microbatch", "the last backward pass"


@dataclass(frozen=True)
class Traffic:
    """One kind of collective, summed over a step.

    size: bytes of the whole tensors; of an all-to-all, those that change ranks. nvlink, network: bytes that a rank
    receives; in an all-to-all, the rank with most. beside: what hides it.
    """

    name: str
    axis: str
    kind: str
    calls: int
    size: int
    nvlink: float
    network: float
    beside: str


def step_traffic(config: TrainConfig, world_size: int, work: Microbatch) -> list[Traffic]:
    """All collectives of a step, but for the gradient norm's (8 bytes)."""
    parallel = config.parallel
    microbatches = microbatches_of(config, world_size)
    spans = {axis: spans_of(config, world_size, axis) for axis in ("tp", "cp", "data", "world")}
    found = []

    def add(name: str, axis: str, kind: str, calls: int, size: int, beside: str) -> None:
        nvlink, network = received(kind, size, *spans[axis])
        if nvlink + network:
            found.append(Traffic(name, axis, kind, calls, size, nvlink, network, beside))

    for (kind, axis), (calls, size) in sorted(work.exchanged.items()):
        name = {"tp": "activations", "cp": "attention's states"}[axis]
        add(name, axis, kind, calls * microbatches, size * microbatches, LAYER)
    for name, kind, width, times, beside in engine_exchanges(config, microbatches):
        elements = math.ceil(parameter_count(config.model) / parallel.tp) * times
        calls = -(-elements // config.engine.reduce_bucket_elements)
        if not config.engine.keeps_weights:
            calls = times * (config.model.layers + 1)
        add(name, "data", kind, calls, width * elements, beside)
    if config.optim.name == "muon":
        axis, _ = sharing(config, world_size)
        moved = exchange(config, world_size, spans[axis][0])
        for name, links in (("matrices, to be updated", moved.gathered), ("updates of matrices", moved.scattered)):
            if moved.elements:
                nvlink, network = (config.engine.element_bytes * elements for elements in links)
                size = config.engine.element_bytes * moved.elements
                found.append(Traffic(name, axis, "all-to-all", moved.rounds, size, nvlink, network, NOTHING))
    return found


def engine_exchanges(config: TrainConfig, microbatches: int) -> list[tuple[str, str, int, int, str]]:
    """(name, kind, bytes an element, times in a step, beside) of each exchange over data x context parallel ranks, of
    all parameters of a tensor-parallel rank: arXiv 1910.02054, section 7; docs/parallelism.md."""
    engine = config.engine
    width = engine.element_bytes
    gradient = width if engine.name == "deepspeed" and engine.gradient_dtype == "bf16" else 4
    if engine.name == "local":
        return [("gradients", "all-reduce", 4, 1, LAST_BACKWARD)]
    if engine.name == "deepspeed" and engine.zero_stage == 0:
        return [("gradients", "all-reduce", width, 1, NOTHING)]
    if engine.sums_own_gradients:
        reduced = ("gradients", "reduce-scatter", 4, 1, LAST_BACKWARD)
        return [reduced, ("updated weights", "all-gather", width, 1, NOTHING)]
    if engine.name == "deepspeed" and engine.zero_stage < 3:
        # DeepSpeed all-reduces its buckets, unless use_multi_rank_bucket_allreduce=false; stage 2 in every microbatch.
        every = microbatches if engine.zero_stage == 2 else 1
        reduced = ("gradients", "all-reduce", gradient, every, MICROBATCH if every > 1 else LAST_BACKWARD)
        return [reduced, ("updated weights", "all-gather", width, 1, NOTHING)]
    return [
        ("weights", "all-gather", width, gathers(config) * microbatches, MICROBATCH),
        ("gradients", "reduce-scatter", 4, microbatches, MICROBATCH),
    ]


def gathers(config: TrainConfig) -> int:
    """In how many of a microbatch's two passes (forward, backward) ZeRO 3 and FSDP2 gather a block's weights: 1 where
    gathered weights are kept until the backward pass, else 2. ZeRO 3 keeps up to stage3_max_live_parameters
    elements."""
    engine = config.engine
    if engine.name == "fsdp2":
        return 2 if engine.reshard_after_forward else 1
    asked = engine.deepspeed_config.get("zero_optimization", {})
    live = asked.get("stage3_max_live_parameters", zero3_live_parameters(config))
    return 1 if parameter_count(config.model) / config.parallel.tp <= live else 2


def microbatches_of(config: TrainConfig, world_size: int) -> int:
    """Number of microbatches of a step on one data-parallel rank."""
    dp = world_size // (config.parallel.tp * config.parallel.cp)
    return max(config.data.global_batch // (config.data.micro_batch * dp), 1)


def spans_of(config: TrainConfig, world_size: int, axis: str) -> tuple[int, int]:
    """(r, k): ranks of a group of `axis` on one node, and nodes that the group spans. Ranks are laid out as in
    parallel/context.py: tensor parallel on neighbouring ranks, then context, then data parallel."""
    tp, cp = config.parallel.tp, config.parallel.cp
    ranks, stride = {"tp": (tp, 1), "cp": (cp, tp), "data": (world_size // tp, tp), "world": (world_size, 1)}[axis]
    node = config.cluster.gpus_per_node or world_size
    on_a_node = min(max(node // stride, 1), ranks)
    return on_a_node, math.ceil(ranks / on_a_node)


def received(kind: str, size: float, ranks: int, nodes: int) -> tuple[float, float]:
    """Bytes over NVLink and over the network: the formulas above, r = ranks on each of k = nodes."""
    both = 2 if kind == "all-reduce" else 1
    return both * size * (ranks - 1) / ranks, both * size * (nodes - 1) / (nodes * ranks)
