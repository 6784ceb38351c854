"""Predicted peak GPU memory of a rank, by kind, computed without a GPU before a run starts.

Activations of a microbatch are measured on fake tensors (microbatch.py, live.py). Parameters, gradients, optimizer
state and engine buffers have formulas: `state_bytes`, `buffer_bytes`, `side_stream_bytes`, `update_bytes`,
`float8_moment_bytes`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from megatron_tn.config import TrainConfig
from megatron_tn.engine.deepspeed.settings import zero3_live_parameters
from megatron_tn.engine.freed_weights import PORTION_BYTES
from megatron_tn.model.registry import parameter_count
from megatron_tn.optim.build import OPTIMIZERS
from megatron_tn.planning.microbatch import Microbatch, microbatch
from megatron_tn.planning.muon import matrix_elements, most_work

GIB = 2**30
SLACK = 0.03  # fragmentation of the caching allocator, as a share of the allocated bytes
CUBLAS = 32 * 2**20  # bytes of cuBLAS's workspace on Hopper, allocated by PyTorch's allocator
OUTSIDE = "outside the allocator (allowance)"


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by kind, for the rank with the highest peak.

    state: parameters, gradients, masters, moments. work: activations of one microbatch, engine buffers, allocator.
    """

    state: dict[str, int]
    work: dict[str, int]

    @property
    def kinds(self) -> dict[str, int]:
        return self.state | self.work

    @property
    def reserved(self) -> int:
        """Predicted `torch.cuda.max_memory_reserved()`."""
        return sum(size for kind, size in self.kinds.items() if kind != OUTSIDE)

    @property
    def total(self) -> int:
        return sum(self.kinds.values())


def plan_memory(config: TrainConfig, world_size: int, work_of: Callable = microbatch) -> MemoryPlan:
    """The plan for `world_size` processes. `config.problems(world_size)` must be empty.

    work_of: `microbatch`, or `extrapolated_in_rows` for a search.

    Raises:
        ValueError: torch.distributed is already initialised in this process.
    """
    state = state_bytes(config, world_size)
    done: Microbatch = work_of(config)
    kept, peak = done.kept, done.peak
    work = {
        "activations kept for backward": kept,
        "temporaries at the peak": peak - kept + CUBLAS,
        "engine buffers": buffer_bytes(config, world_size, peak)
        + side_stream_bytes(config)
        + max(update_bytes(config, world_size, peak), float8_moment_bytes(config, world_size, peak)),
    }
    allocated = sum(state.values()) + sum(work.values())
    work["allocator slack"] = int(SLACK * allocated)
    work[OUTSIDE] = int(config.cluster.outside_allocator_gib * GIB)
    return MemoryPlan(state, work)


def state_bytes(config: TrainConfig, world_size: int) -> dict[str, int]:
    """Bytes of parameters, gradients, fp32 masters and the optimizer's moments per rank, by kind: two fp32 values a
    parameter for AdamW, one for a parameter that Muon updates.

    With engine.products=fp8 and where a rank keeps its weights whole, the blocks' matrices are parameters in fp8, of a
    byte as rows and another one transposed; in the computing type they exist for moments (`float8_moment_bytes`).

    With P parameters, each kind has P / tp values, divided by dp x cp from a ZeRO stage on (arXiv 1910.02054, figure
    1): moments and masters from stage 1, gradients from 2, parameters from 3. FSDP2 divides like stage 3, and its
    fp32 parameters are the masters. With engine.precision=fp32 the local engine and ZeRO 0 use the parameters as
    masters, too; ZeRO 1 to 3 hold separate masters.
    """
    engine = config.engine
    data = world_size // config.parallel.tp
    stage = {"deepspeed": engine.zero_stage, "fsdp2": 3, "local": 0}[engine.name]
    local = math.ceil(parameter_count(config.model) / config.parallel.tp)
    width = engine.element_bytes if engine.name != "fsdp2" else 4
    gradient_width = 4 if engine.name != "deepspeed" or engine.gradient_dtype == "fp32" else width

    def over_data(count: int, from_stage: int) -> int:
        return math.ceil(count / data) if stage >= from_stage else count

    if config.optim.name == "muon":  # a matrix has its momentum alone, the rest AdamW's two moments
        moments = 8 * local - 4 * math.ceil(matrix_elements(config.model) / config.parallel.tp)
    else:
        moments = 4 * len(OPTIMIZERS[config.optim.name].state_kinds) * local
    separate_masters = engine.name != "fsdp2" and (engine.precision == "bf16" or stage > 0)
    matrices = math.ceil(matrix_elements(config.model) / config.parallel.tp)
    freed = width * matrices if engine.frees_weights else 0
    fp8 = (
        (2 if engine.keeps_fp8_transposes else 1) * matrices if engine.products == "fp8" and engine.keeps_weights else 0
    )
    return {
        "parameters": over_data(local * width, 3) - freed + fp8,
        "gradients": over_data(local * gradient_width, 2),
        "masters": over_data(local * 4, 1) if separate_masters else 0,
        "moments": over_data(moments, 1),
    }


def buffer_bytes(config: TrainConfig, world_size: int, activations: int) -> int:
    """Bytes of the engines' buffers for gathered parameters and for the reduction and casting of gradients.

    activations: bytes at a microbatch's peak. Buffers allocated after the backward pass reuse the memory of the freed
    activations: the allocator has expandable segments (device/allocator.py).
    """
    engine, model = config.engine, config.model
    tp = config.parallel.tp
    data = world_size // tp
    width = engine.element_bytes
    local = math.ceil(parameter_count(model) / tp)
    embedding = math.ceil(model.vocab_size * model.embed_dim / tp)
    block = math.ceil((local - embedding) / model.layers)
    bucket = min(engine.reduce_bucket_elements, local)
    if engine.name == "fsdp2":
        # Gathered at once: the embedding, the current block and the next one. In the backward pass, one block's
        # gradients exist in the computing type while the preceding block's are reduced in fp32.
        gathered = local if not engine.reshard_after_forward else embedding + 2 * min(block, local)
        return gathered * width + block * (width + 4) + embedding * (width + 4)
    if engine.sums_own_gradients or engine.zero_stage == 0:
        return 0  # gradients are summed and reduced in place
    if engine.zero_stage == 3:
        # In the backward pass, one block's gradients exist in the computing type while another block's are reduced.
        gathered = min(local, zero3_live_parameters(config) + block) * width
        return gathered + block * (width + (4 if engine.gradient_dtype == "fp32" else width))
    if engine.zero_stage == 2:
        return 2 * bucket * width + width * math.ceil(local / data)
    # Stage 1 without `sums_own_gradients`: after the last microbatch DeepSpeed copies the gradients into a flat buffer,
    # and copies that buffer to fp32.
    return bucket * width + max(0, (2 * width + 4) * local - activations)


def update_bytes(config: TrainConfig, world_size: int, activations: int) -> int:
    """Bytes of a round of Muon's update (engine/matrix_rounds.py, kernels/newton_schulz): in the computing type, the
    matrices as they are sent, X, and at most twice as much for X X^T, polynomials of it and the next X. They reuse the
    memory of the freed activations, which a CUDA graph keeps."""
    if config.optim.name != "muon":
        return 0
    engine = config.engine
    elements = most_work(config, world_size).elements
    reused = 0 if engine.cuda_graph else activations
    return max(0, 4 * elements * engine.element_bytes - reused)


def float8_moment_bytes(config: TrainConfig, world_size: int, activations: int) -> int:
    """Bytes of the blocks' matrices in the computing type where they are kept in fp8 (engine/freed_weights.py): all of
    them during an evaluation, else a bucket, or a portion of them at once. They reuse the memory of the freed
    activations, which a CUDA graph keeps."""
    engine, tp = config.engine, config.parallel.tp
    if not engine.frees_weights:
        return 0
    width = engine.element_bytes
    size = width * math.ceil(matrix_elements(config.model) / tp)
    if not config.evaluation.is_on:
        bucket = 2 * config.model.glu_dim * config.model.embed_dim // tp  # the largest weights that are stacked
        if engine.name == "deepspeed" and engine.zero_stage:
            bucket += engine.reduce_bucket_elements
            bucket = max(bucket, PORTION_BYTES // width if world_size > tp else 0)
        else:
            bucket += PORTION_BYTES // width
        size = min(size, width * bucket)
    return max(0, size - (0 if engine.cuda_graph else activations))


def side_stream_bytes(config: TrainConfig) -> int:
    """Bytes of inputs kept alive for weight-gradient products on the side stream of a CUDA graph
    (device/side_stream.py): at most those of an SGLU and of the projection before it."""
    if not config.engine.cuda_graph:
        return 0
    model, data = config.model, config.data
    values = 3 * model.glu_dim // config.parallel.tp + 3 * model.embed_dim
    return values * data.micro_batch * data.sequence_length * config.engine.element_bytes
