"""Peak memory of a rank, by kind, before anything is started and without a GPU.

What a microbatch needs is not a formula: the model's own code runs forward and backward on tensors without storage,
with the operators answering as on a GPU, and the bytes alive are counted operator by operator. What an engine holds
beside that is `state_bytes` and `buffer_bytes`.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from megatron_tn.config import TrainConfig
from megatron_tn.engine.base import DTYPES
from megatron_tn.engine.deepspeed.settings import zero3_live_parameters
from megatron_tn.model.base import Model
from megatron_tn.model.registry import build_model, parameter_count
from megatron_tn.parallel.context import Axis, ParallelContext
from megatron_tn.parallel.recompute import recompute_blocks
from megatron_tn.planning.live import BLOCK, LiveMemory

GIB = 2**30
# The allocator holds more than what lives in it: pieces of its segments that nothing fits. A share of what is alive.
SLACK = 0.03
CUBLAS = 32 * 2**20  # a matrix product's workspace on Hopper, from the allocator as well


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of the rank that needs most: of the model's state, of one microbatch, and beside them."""

    state: dict[str, int]
    work: dict[str, int]

    @property
    def kinds(self) -> dict[str, int]:
        return self.state | self.work

    @property
    def reserved(self) -> int:
        """What `torch.cuda.max_memory_reserved` should say."""
        return sum(size for kind, size in self.kinds.items() if kind != OUTSIDE)

    @property
    def total(self) -> int:
        return sum(self.kinds.values())


OUTSIDE = "outside the allocator (allowance)"


def plan_memory(config: TrainConfig, world_size: int) -> MemoryPlan:
    """The plan for a layout that divides (`config.problems(world_size)` is empty)."""
    state = state_bytes(config, world_size)
    kept, peak = activation_bytes(config)
    work = {
        "activations kept for backward": kept,
        "temporaries at the peak": peak - kept + CUBLAS,
        "engine buffers": buffer_bytes(config, world_size, peak) + beside_bytes(config),
    }
    allocated = sum(state.values()) + sum(work.values())
    work["allocator slack"] = int(SLACK * allocated)
    work[OUTSIDE] = int(config.cluster.outside_allocator_gib * GIB)
    return MemoryPlan(state, work)


def state_bytes(config: TrainConfig, world_size: int) -> dict[str, int]:
    """Bytes a rank holds of parameters, gradients, fp32 masters and AdamW's two moments, by kind.

    Tensor parallel divides everything; dp x cp divides moments and masters from ZeRO 1 on, gradients from 2 on,
    parameters at 3 (arXiv 1910.02054, figure 1). In fp32 a parameter is its own master where nothing is partitioned;
    ZeRO 1 to 3 copy masters out in fp32 too; FSDP2's parameters are the masters.
    """
    engine = config.engine
    data = world_size // config.parallel.tp
    stage = {"deepspeed": engine.zero_stage, "fsdp2": 3, "local": 0}[engine.name]
    local = math.ceil(parameter_count(config.model) / config.parallel.tp)
    width = 2 if engine.precision == "bf16" and engine.name != "fsdp2" else 4
    gradient_width = 4 if engine.name != "deepspeed" or engine.gradient_dtype == "fp32" else width

    def over_data(count: int, from_stage: int) -> int:
        return math.ceil(count / data) if stage >= from_stage else count

    separate_masters = engine.name != "fsdp2" and (engine.precision == "bf16" or stage > 0)
    return {
        "parameters": over_data(local * width, 3),
        "gradients": over_data(local * gradient_width, 2),
        "masters": over_data(local * 4, 1) if separate_masters else 0,
        "moments": over_data(local * 8, 1),
    }


def buffer_bytes(config: TrainConfig, world_size: int, activations: int) -> int:
    """What engines hold for a while to gather parameters and to reduce and convert gradients, bytes.

    activations: the peak of a microbatch. Where the engine's own peak comes when activations are gone, they make room
    for it, as segments grow and what is free in them joins (parallel/world.py).
    """
    engine, model = config.engine, config.model
    tp = config.parallel.tp
    data = world_size // tp
    width = 2 if engine.precision == "bf16" else 4
    local = math.ceil(parameter_count(model) / tp)
    embedding = math.ceil(model.vocab_size * model.embed_dim / tp)
    block = math.ceil((local - embedding) / model.layers)
    bucket = min(engine.reduce_bucket_elements, local)
    if engine.name == "fsdp2":
        # The embedding stays gathered; a block is in use while the next one comes. Backward, one block's gradients are
        # there as computed while another's are reduced in fp32.
        gathered = local if not engine.reshard_after_forward else embedding + 2 * min(block, local)
        return gathered * width + block * (width + 4) + embedding * (width + 4)
    if engine.name == "local" or engine.zero_stage == 0:
        return 0
    if engine.zero_stage == 3:
        # Backward, one block's gradients are there as computed while another's are reduced.
        gathered = min(local, zero3_live_parameters(config) + block) * width
        return gathered + block * (width + (4 if engine.gradient_dtype == "fp32" else width))
    if engine.zero_stage == 2:
        return 2 * bucket * width + width * math.ceil(local / data)
    if width == 2 and engine.gradient_dtype == "fp32":
        return 0  # gradients are summed in place, and reduced there
    # Else stage 1 keeps gradients in the computing type until the last microbatch is done, then makes them flat twice,
    # once in fp32.
    return bucket * width + max(0, (2 * width + 4) * local - activations)


def beside_bytes(config: TrainConfig) -> int:
    """Inputs of the products that a CUDA graph leaves to run beside the pass (device/side_stream.py), bytes: at most
    those of an SGLU and of the projection before it."""
    if not config.engine.cuda_graph:
        return 0
    model, data = config.model, config.data
    values = 3 * model.glu_dim // config.parallel.tp + 3 * model.embed_dim
    return values * data.micro_batch * data.sequence_length * (2 if config.engine.precision == "bf16" else 4)


def activation_bytes(config: TrainConfig, device: str = "cuda") -> tuple[int, int]:
    """(kept, peak) of one microbatch beyond the parameters, bytes: what is alive when the loss is known, and at most.

    device: whose operators and allocator are counted, "cuda" or "cpu". Compiled blocks are counted as eager ones: their
    heavy operators are opaque to the compiler, which keeps the same.
    """
    rules = (BLOCK, WORKSPACE) if device == "cuda" else ()
    with stand_ins(device), FakeTensorMode(), LiveMemory(*rules) as memory:
        model = step_model(config)
        for parameter in model.parameters():
            # Every engine takes a gradient over as soon as it is there.
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
        data = config.data
        tokens = torch.zeros(data.micro_batch, data.sequence_length, dtype=torch.int64)
        before = memory.current
        loss = model(tokens, targets=tokens, reduction="sum").loss
        kept = memory.current - before
        loss.backward()
        return kept, memory.peak - before


def step_model(config: TrainConfig) -> Model:
    """The model as an engine runs it, on a rank of the layout that needs most, its groups being stand-ins."""
    tp, cp = config.parallel.tp, config.parallel.cp
    layout = {"tp": _axis(tp, 0), "cp": _axis(cp, cp - 1)}  # the last slice of a sequence is the longest
    context = ParallelContext(**layout, sequence_parallel=config.parallel.sequence_parallel)
    model = build_model(config.model, context, "cpu", DTYPES[config.engine.precision])
    recompute_blocks(model.blocks, config.engine.recompute, config.engine.recompute_every)
    return model


@contextlib.contextmanager
def stand_ins(device: str) -> Iterator[None]:
    """Fake tensors say that they are on a GPU, where one is meant, and collectives leave their tensors as they are.

    They cannot be on one: autograd refuses a device that this build of torch does not know.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(FakeTensor, "is_cuda", device == "cuda", create=True))
        # Choices that nothing really runs by are not for the log.
        stack.enter_context(mock.patch.object(logging.getLogger("kernels.dispatch"), "disabled", True))
        for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor"):
            stack.enter_context(mock.patch.object(dist, name, _silent))
        stack.enter_context(mock.patch.object(dist.distributed_c10d, "_resolve_process_group", _Group.of_name))
        stack.enter_context(mock.patch.object(torch, "addmm", _widening_addmm(torch.addmm)))
        yield


def _widening_addmm(addmm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.addmm; what adds to a wider `out` takes nothing, and fake tensors of torch 2.11 cannot do it."""
    return lambda *args, **options: options["out"] if "out_dtype" in options else addmm(*args, **options)


class _Done:
    def wait(self, *args) -> bool:
        return True


def _silent(*args, **kwargs) -> _Done:
    return _Done()


class _Group:
    """In the place of a process group, for those who ask how large it is."""

    def __init__(self, rank: int, size: int):
        self._rank, self._size = rank, size
        self.group_name = f"stand-in {rank} {size}"  # operators take groups by name

    @classmethod
    def of_name(cls, name: str) -> _Group:
        return cls(*map(int, name.split()[1:]))

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def _axis(size: int, rank: int) -> Axis:
    return Axis(_Group(rank, size), rank, size) if size > 1 else Axis()


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _gla_gradients_bytes(qkvu: Tensor, theta: Tensor | None) -> int:
    """The gradient of o; with LRPE those of q's and k's features, twice as wide, as well (kernels/lightning/gla.py)."""
    part = qkvu.numel() // 4 * qkvu.element_size()
    return part if theta is None else 5 * part


def _rows_bytes(x: Tensor, rows: int) -> int:
    """Of x [.., D] with `rows` tokens in place of its own."""
    return rows * x.shape[-1] * x.element_size()


# Sequence parallel's products hold the gathered tokens, and sums that are not shared out yet, within one operator.
WORKSPACE = {
    "megatron_tn.gla_backward.default": lambda dy, dsquare_sum, dstate, o, qkvu, decay, theta, *rest: (
        _gla_gradients_bytes(qkvu, theta)
    ),
    "megatron_tn.gla_slice_backward.default": lambda dy, dsquare_sum, o, qkvu, decay, theta, *rest: (
        _gla_gradients_bytes(qkvu, theta)
    ),
    "megatron_tn.column_forward.default": lambda x, weights, group, rows: _rows_bytes(x, rows),
    "megatron_tn.row_forward.default": lambda x, weight, group, rows, beside=None: (
        rows * weight.shape[0] * x.element_size()
    ),
}


def remedies(config: TrainConfig, world_size: int) -> list[tuple[str, MemoryPlan]]:
    """Changes that make the run fit cluster.gpu_memory_gib, one setting each or all at once; else the nearest to it."""
    engine, data = config.engine, config.data
    full = replace(engine, recompute="full", recompute_every=1)
    candidates: list[tuple[str, TrainConfig]] = []
    rows = data.micro_batch
    while rows > 1:
        rows //= 2
        candidates.append((f"data.micro_batch={rows}", replace(config, data=replace(data, micro_batch=rows))))
    if engine.recompute == "none":
        candidates.append(("engine.recompute=selective", replace(config, engine=replace(full, recompute="selective"))))
    if (engine.recompute, engine.recompute_every) != ("full", 1):
        candidates.append(("engine.recompute=full", replace(config, engine=full)))
    if engine.name == "deepspeed":
        for stage in range(engine.zero_stage + 1, 4):
            if stage == 3:  # of the two that shard everything, the faster one first (docs/performance.md)
                candidates.append(("engine=fsdp2", replace(config, engine=replace(engine, name="fsdp2"))))
            candidates.append((f"engine=zero{stage}", replace(config, engine=replace(engine, zero_stage=stage))))
    if config.parallel.tp > 1 and not config.parallel.sequence_parallel:
        shared = replace(config, parallel=replace(config.parallel, sequence_parallel=True))
        candidates.append(("parallel.sequence_parallel=true", shared))
    for axis in ("tp", "cp"):
        for factor in (2, 4, 8):
            size = factor * getattr(config.parallel, axis)
            finer = replace(config, parallel=replace(config.parallel, **{axis: size}))
            candidates.append((f"parallel.{axis}={size}", finer))
    least = replace(config, engine=replace(full, zero_stage=3 if engine.name == "deepspeed" else engine.zero_stage))
    least = replace(least, data=replace(data, micro_batch=1))
    stage = " engine=zero3" if engine.name == "deepspeed" and engine.zero_stage < 3 else ""
    candidates.append((f"data.micro_batch=1 engine.recompute=full{stage}", least))
    plans: dict[str, MemoryPlan] = {}
    fitting: dict[str, MemoryPlan] = {}
    for name, candidate in candidates:
        setting = name.partition("=")[0]
        # The first value of a setting that fits costs least; all at once is for when no single one does.
        if setting in {fit.partition("=")[0] for fit in fitting} or candidate.problems(world_size):
            continue
        if " " in name and fitting:
            continue
        plans[name] = plan_memory(candidate, world_size)
        if plans[name].total <= config.cluster.gpu_memory_gib * GIB:
            fitting[name] = plans[name]
    return list(fitting.items()) or sorted(plans.items(), key=lambda pair: pair[1].total)[:1]


def memory_problems(config: TrainConfig, world_size: int) -> list[str]:
    """A line that says by how much the run does not fit, and what would help; none where it fits or nobody knows."""
    limit = config.cluster.gpu_memory_gib
    if limit <= 0:
        return []
    plan = plan_memory(config, world_size)
    if plan.total <= limit * GIB:
        return []
    kinds = ", ".join(f"{kind} {size / GIB:.1f}" for kind, size in plan.kinds.items() if size >= 0.05 * GIB)
    found = remedies(config, world_size)
    offered = "; ".join(f"{name} needs {better.total / GIB:.1f}" for name, better in found)
    if found and found[0][1].total > limit * GIB:
        offered = f"nothing tried is enough, the closest is {offered}: take more nodes"
    return [
        f"a rank needs {plan.total / GIB:.1f} GiB, but cluster.gpu_memory_gib={limit} ({kinds}), with parallel.tp="
        f"{config.parallel.tp}, parallel.cp={config.parallel.cp}, parallel.sequence_parallel="
        f"{str(config.parallel.sequence_parallel).lower()}, engine.name={config.engine.name}, engine.zero_stage="
        f"{config.engine.zero_stage}, engine.recompute={config.engine.recompute}, data.micro_batch="
        f"{config.data.micro_batch}, data.sequence_length={config.data.sequence_length}; in GiB: {offered or 'none'}"
    ]
