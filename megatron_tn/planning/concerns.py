"""Warnings of a plan: settings that are allowed but seldom intended, one line each."""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace

from megatron_tn.config import ParallelConfig, TrainConfig
from megatron_tn.model.registry import parameter_count
from megatron_tn.planning.batch import REASON, is_far, usual_tokens
from megatron_tn.planning.estimate import state_bytes
from megatron_tn.planning.speed import StepTime

HOST_BLOCK_S = 11e-3  # to launch a block's forward and backward pass at tp > 1 (docs/scaling.md)
NOTICEABLE = 0.05  # share of the time between two checkpoints


def checkpoint_bytes(config: TrainConfig) -> int:
    """fp32 masters and the optimizer's moments, each element once: 12 bytes a parameter with AdamW."""
    whole = replace(config, parallel=ParallelConfig())
    return 4 * parameter_count(config.model) + state_bytes(whole, 1)["moments"]


def rank_checkpoint_bytes(config: TrainConfig, world_size: int) -> float:
    """Bytes that one rank writes: masters and moments are split over all ranks with ZeRO and FSDP2, else over
    tensor-parallel ranks."""
    return checkpoint_bytes(config) / (world_size if config.engine.shards_state else config.parallel.tp)


def checkpoint_seconds(config: TrainConfig) -> float | None:
    """Seconds to write a checkpoint, each node its part; None where `cluster.storage_gbs` is not known."""
    rate = config.cluster.storage_gbs
    return checkpoint_bytes(config) / (config.nodes * rate * 1e9) if rate else None


def concerns(config: TrainConfig, time: StepTime | None, environment: Mapping[str, str] = os.environ) -> Iterator[str]:
    """One line per warning, naming the setting, its value and the relation."""
    parallel, cluster, node = config.parallel, config.cluster, config.cluster.gpus_per_node
    if not cluster.gpu_memory_gib:
        yield (
            "cluster.gpu_memory_gib=0: the GPUs' memory is not known, so nothing says whether the layout fits; choose "
            "a cluster, such as cluster=h100_80g"
        )
    if time is not None and config.engine.precision == "fp32":
        yield "engine.precision=fp32: the time is that of bf16 products, since cluster.matrix_rates has no fp32 rates"
    if time is not None and config.engine.products == "fp8" and not cluster.fp8_tflops:
        yield (
            f"engine.products=fp8, but cluster.fp8_tflops is null: the GPUs of cluster={cluster.name} may have no fp8 "
            "products"
        )
    if node and (parallel.tp > node or node % parallel.tp):
        yield (
            f"parallel.tp={parallel.tp} crosses nodes of cluster.gpus_per_node={node}: every layer's activations then "
            "go over the network"
        )
    if line := other_world(config, environment):
        yield line
    if is_far(config):
        tokens, usual = config.data.global_batch * config.data.sequence_length, usual_tokens(config)
        yield (
            f"data.global_batch={config.data.global_batch} x data.sequence_length={config.data.sequence_length} is "
            f"{tokens / 1e6:.2f} M tokens, far from {usual / 1e6:.1f} M: {REASON}"
        )
    if time is not None and (line := _host_concern(config, time)):
        yield line
    yield from _checkpoint_concerns(config, time)


def _host_concern(config: TrainConfig, time: StepTime) -> str | None:
    parallel, data = config.parallel, config.data
    tokens = data.micro_batch * data.sequence_length / (parallel.tp * parallel.cp)
    microbatch = time.products + time.memory + time.tensor_parallel  # what data parallel ranks exchange is no block's
    block = microbatch * tokens / time.tokens_per_gpu / config.model.layers
    if parallel.tp == 1 or config.engine.cuda_graph or block > HOST_BLOCK_S:
        return None
    return (
        f"data.micro_batch={data.micro_batch} x data.sequence_length={data.sequence_length}, "
        f"parallel.tp={parallel.tp}: a block takes the GPU {1e3 * block:.1f} ms, and the host about "
        f"{1e3 * HOST_BLOCK_S:.0f} ms to launch: take a larger microbatch, less tensor parallelism, or "
        "engine.cuda_graph=true"
    )


def other_world(config: TrainConfig, environment: Mapping[str, str]) -> str | None:
    """One line where the nodes that SLURM gave, or the processes that a launcher started, are not those of `nodes`. In
    a SLURM job nodes=1, the default, is no statement: plain sbatch has an option of its own."""
    nodes, given = config.nodes, environment.get("SLURM_JOB_NUM_NODES", "")
    if given.isdecimal() and int(given) != nodes:
        if nodes > 1:
            return f"nodes={nodes}, but this SLURM job has {given}"
        nodes = int(given)
    started, node = environment.get("WORLD_SIZE", ""), config.cluster.gpus_per_node
    if node and started.isdecimal() and int(started) != nodes * node:
        return f"nodes={nodes} x cluster.gpus_per_node={node} is not the world of {started} processes started"
    return None


def _checkpoint_concerns(config: TrainConfig, time: StepTime | None) -> Iterator[str]:
    seconds, every = checkpoint_seconds(config), config.checkpoint.every
    if seconds is None or time is None or not every:
        return
    share = seconds / (every * time.total)
    if share > NOTICEABLE:
        yield (
            f"checkpoint.every={every} steps take {every * time.total:,.0f} s, and writing a checkpoint of "
            f"{checkpoint_bytes(config) / 1e9:,.1f} GB takes {seconds:,.0f} s: {math.ceil(100 * share)} % of that time"
        )
