"""DeepSpeed ZeRO 0-3 (arXiv 1910.02054), the main engine.

DeepSpeed averages gradients over data-parallel ranks and accumulation steps on its own; here the loss is already
divided by the step's target tokens over all of them, so that averaging is cancelled. At stage 1 in bf16 gradients are
summed, and reduced during the backward pass, by this package (parallel/main_gradient.py, parallel/reduction.py).
Masters and moments are reached as flat fp32 ranges of each local parameter, whatever the stage keeps them in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import logging
import os
import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_tn.config import TrainConfig
from megatron_tn.engine.base import DTYPES, MOMENTS, StepResult, optimizer_state, set_optimizer_step
from megatron_tn.engine.clipping import clip_gradients, clipped_step
from megatron_tn.engine.deepspeed_settings import deepspeed_settings
from megatron_tn.engine.passes import CapturedPasses, Passes, capture_stream, on_stream
from megatron_tn.engine.zero3 import PartitionedUpdate
from megatron_tn.model.block import Block
from megatron_tn.model.transnormer import TransNormerLM, empty_model
from megatron_tn.optim.adamw import FusedAdamW
from megatron_tn.optim.groups import build_adamw, parameter_groups
from megatron_tn.parallel.collectives import gather_parts_
from megatron_tn.parallel.context import Axis, ParallelContext
from megatron_tn.parallel.gradients import gradient_norm
from megatron_tn.parallel.main_gradient import MainGradient, attach
from megatron_tn.parallel.reduction import OverlappedReduction, buckets
from megatron_tn.parallel.sharding import OwnedRange, mark
from megatron_tn.parallel.world import release_on_leaving

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")

import deepspeed
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import logger, safe_get_full_grad, set_z3_leaf_modules

logger.setLevel(logging.ERROR)  # its warnings are about choices that are made here on purpose
warnings.filterwarnings("ignore", message=".*torch.distributed.*deprecated", category=FutureWarning)  # its calls
# On a CPU DeepSpeed would compile a shared-memory all-reduce with g++ at start-up: 95 s, and a lock left behind when it
# is killed. Declaring that operator incompatible makes DeepSpeed take gloo's.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
# For every group of parameters its bf16 optimizer prints, unasked, what memory is in use, and collects garbage first.
bf16_optimizer.see_memory_usage = lambda *_, **__: None


class ModelParallelUnit:
    """The layout, in the words DeepSpeed asks for it.

    Data parallelism is stated as dp x cp, both as "data" and as "sequence data": ranks that hold slices of one sequence
    see different tokens, so ZeRO must reduce gradients over them and may partition over them.
    """

    def __init__(self, context: ParallelContext):
        self._tensor = _with_group(context.tp, context.rank)
        self._data = _with_group(context.data, context.rank)

    def get_model_parallel_rank(self) -> int:
        return self._tensor.rank

    def get_model_parallel_world_size(self) -> int:
        return self._tensor.size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._tensor.group

    def get_data_parallel_rank(self) -> int:
        return self._data.rank

    def get_data_parallel_world_size(self) -> int:
        return self._data.size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._data.group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group
    get_sequence_data_parallel_rank = get_data_parallel_rank
    get_sequence_data_parallel_world_size = get_data_parallel_world_size
    get_sequence_data_parallel_group = get_data_parallel_group


def _with_group(axis: Axis, rank: int) -> Axis:
    """DeepSpeed takes a missing group for the whole world, so an axis of size 1 needs a group of its own."""
    if axis.group is not None:
        return axis
    return Axis(dist.new_group([rank], use_local_synchronization=True), 0, 1)


def partitioned_model(config: TrainConfig, context: ParallelContext, device: torch.device) -> TransNormerLM:
    """A model for ZeRO 3: each parameter gets storage and is partitioned before the next one does.

    Not within `zero.Init` as a context, which replaces tensor constructors for the whole process.
    """
    unit = ModelParallelUnit(context)
    model = empty_model(config.model, context, "meta", DTYPES[config.engine.precision])
    # Gathered as one, as FSDP2 does. Module by module, a block that is recomputed would gather its weights for the
    # second pass, let go of them, and gather them again for the backward pass.
    set_z3_leaf_modules(model, [Block])
    partition, made = None, {}
    for module in model.modules():
        for name, empty in module.named_parameters(recurse=False):
            if empty not in made:
                made[empty] = mark(nn.Parameter(torch.empty_like(empty, device=device)), empty.shard_spec)
            parameter = made[empty]  # the head's is the embedding's
            module.register_parameter(name, parameter)
            if partition is None:
                with contextlib.redirect_stdout(io.StringIO()):
                    deepspeed.zero.Init(
                        module=module,
                        data_parallel_group=unit.get_data_parallel_group(),
                        config_dict_or_path=deepspeed_settings(config, context.dp.size),
                        mpu=unit,
                    )
                partition = parameter.convert_to_zero_parameters
            else:
                partition(param_list=[parameter])
    return model


class DeepSpeedEngine:
    """See `engine.base.Engine`."""

    def __init__(self, model: TransNormerLM, config: TrainConfig):
        self.model = model
        self.context = model.context
        self.stage = config.engine.zero_stage
        self.partitioned = self.stage > 0
        self.clip_norm = config.optim.clip_norm
        self.bare = self.stage == 0 and config.engine.precision == "fp32"  # DeepSpeed wraps no optimizer then
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        named = [(name, p, len(p.shard_spec.shape)) for name, p in model.named_parameters()]  # ZeRO 3's are flat by now
        # Stage 0 wraps apex's optimizer in a flat form of its own, which nothing here would gain from.
        settings = config.optim if self.stage else dataclasses.replace(config.optim, fused="torch")
        groups = parameter_groups(named, config.optim.weight_decay)
        if self.stage == 1 and (config.engine.precision, config.engine.gradient_dtype) == ("bf16", "fp32"):
            # DeepSpeed lays a group out flat, with a part for every rank, and that is reduced and gathered as one.
            elements = config.engine.reduce_bucket_elements
            groups = [group | {"params": part} for group in groups for part in buckets(group["params"], elements)]
        optimizer = build_adamw(groups, settings)
        settings = deepspeed_settings(config, self.context.dp.size)
        if self.bare:
            settings["gradient_clipping"] = 0.0  # done in step(), where a non-finite norm can still be refused
        stream = capture_stream(next(model.parameters()).device) if config.engine.cuda_graph else None
        # Its bf16 optimizer keeps nodes of the backward graph, which belong to the stream that they are made on.
        with on_stream(stream):
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=settings,
                mpu=ModelParallelUnit(self.context),
                dist_init_required=False,
            )
        # The torch (or apex) optimizer underneath the wrapper, which holds learning rates and moments.
        self.inner = getattr(self.optimizer, "optimizer", self.optimizer)
        self.main_gradients = self._attach_main_gradients()
        if self.main_gradients:
            self._update_own_part()
        elif self.stage == 3:
            self.partitioned_update = PartitionedUpdate(self.optimizer, self.context, self.clip_norm)
        elif self.stage:
            self._clip_within_update()
        release_on_leaving(self)
        self.passes = None
        if self.main_gradients:
            summed = list(zip(self.optimizer.bf16_groups, self.optimizer.fp32_groups_gradients_flat, strict=True))
            reduction = OverlappedReduction(summed, self.context.data, partitioned=True)
            self.passes = Passes(model, self.main_gradients, reduction)
            if config.engine.cuda_graph:
                self.passes = CapturedPasses(model, self.main_gradients, reduction, stream)

    def release(self) -> None:
        """Give parameters, masters and moments free, which would stay for as long as the process does: DeepSpeed's
        parameters hold themselves, and at stage 3 a list of modules and a method's cache hold its engine."""
        self.engine.destroy()
        for parameter in self.names:
            vars(parameter).clear()
        FWD_MODULE_STACK.clear()
        cached = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
        inspect.getclosurevars(cached).nonlocals["func"].cache_clear()

    def _clip_within_update(self) -> None:
        """DeepSpeed has found the norm by the time it calls its optimizer's step, and would have made a pass over all
        gradients to clip them."""
        self.optimizer.clip_grad = 0.0
        self.optimizer.unscale_and_clip_grads = lambda *_: None  # stage 2; the loss is not scaled
        device = next(iter(self.names)).device

        def clip(*_) -> None:
            norm = torch.as_tensor(self.optimizer._global_grad_norm, device=device)
            clip_gradients(self.inner, norm, self.clip_norm)

        self.inner.register_step_pre_hook(clip)

    def _attach_main_gradients(self) -> list[MainGradient]:
        """Have gradients summed where DeepSpeed's optimizer for bf16 at stage 1 keeps its fp32 sums.

        By itself it lets every bf16 gradient live until the backward pass is done, and then widens and adds each.
        Other stages take gradients from autograd one by one, to reduce them at once: they have no such sums.
        """
        optimizer = self.optimizer
        if not hasattr(optimizer, "fp32_groups_gradients") or optimizer.grad_acc_dtype != torch.float32:
            return []
        found = []
        for parameters, sums in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True):
            for parameter, total in zip(parameters, sums, strict=True):
                found.append(attach(parameter, total.view(parameter.shape)))
                parameter._hp_grad = total  # where DeepSpeed's own functions look for it
        optimizer.clear_hp_grads = lambda: None  # the next step's first gradient makes room for itself
        return found

    def _update_own_part(self) -> None:
        """Put in the place of DeepSpeed's step at stage 1, which looks for the norm in sums of which this rank has its
        part alone, waits for it before it queues the update, and then copies every master."""
        optimizer, data = self.optimizer, self.context.data
        masters, gradients = optimizer.fp32_groups_flat_partition, optimizer.fp32_groups_gradient_flat_partition
        whole = optimizer.bf16_groups_flat
        parts = [flat.chunk(data.size)[data.rank] for flat in whole]
        fused = isinstance(self.inner, FusedAdamW)
        if fused:
            self.inner.copies = dict(zip(masters, parts, strict=True))
        own = [
            (parameter.shard_spec, parameter.main_gradient.sum.view(-1).narrow(0, place.start, place.numel))
            for parameter in self.names
            if parameter._hp_mapping is not None
            for place in [parameter._hp_mapping.lp_fragment_address]
        ]

        @torch.no_grad()
        def step() -> None:
            norm = gradient_norm(own, self.context.tp, masters[0].device, sharded_over=data)
            for master, gradient in zip(masters, gradients, strict=True):
                master.grad = gradient
            norm = clipped_step(self.inner, norm, self.clip_norm)
            optimizer._global_grad_norm, optimizer.overflow = norm, not norm < float("inf")
            if optimizer.overflow:
                return
            if not fused:
                torch._foreach_copy_(parts, masters)
            gather_parts_(whole, data)

        optimizer.step = step

    def forward_backward(
        self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor | None, *, scale: Tensor, last: bool
    ) -> Tensor:
        self.engine.set_gradient_accumulation_boundary(last)
        if self.passes is not None:
            loss = self.passes(tokens, targets, cu_seqlens, scale, last)
            if not last:
                self.engine.step()  # counts the microbatch
            return loss
        loss = self.engine(tokens, targets=targets, cu_seqlens=cu_seqlens, reduction="sum").loss * scale
        # DeepSpeed will divide by the number of data-parallel ranks.
        averaged_over = 1 if self.stage == 3 else self.context.data.size
        self.engine.backward(loss * averaged_over, scale_wrt_gas=False)
        if not last:
            self.engine.step()
        return loss.detach()

    def step(self, lr: float) -> StepResult:
        for group in self.inner.param_groups:
            group["lr"] = lr
        if self.bare:
            return self._bare_step()
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return StepResult(float(norm), self.engine.was_step_applied())

    def _bare_step(self) -> StepResult:
        gradients = [(parameter.shard_spec, parameter.grad) for parameter in self.names]
        norm = gradient_norm(gradients, self.context.tp, gradients[0][1].device)
        if not norm.isfinite():
            self.engine.zero_grad()
            return StepResult(norm.item(), False)
        clip_gradients(self.inner, norm, self.clip_norm)
        self.engine.step()
        return StepResult(norm.item(), True)

    def named_logical_gradients(self) -> dict[str, Tensor]:
        found = {}
        for parameter, name in self.names.items():
            spec = parameter.shard_spec
            local = safe_get_full_grad(parameter).view(spec.local_shape(self.context.tp.rank, self.context.tp.size))
            found[name] = spec.gather(local, self.context.tp)
        return found

    def owned_ranges(self) -> list[OwnedRange]:
        return [
            OwnedRange(name, start, stop, self._values(master, offset, stop - start))
            for name, start, stop, master, offset in self._placements()
        ]

    def _values(self, master: Tensor, offset: int, length: int) -> dict[str, Tensor]:
        state = optimizer_state(self.inner, master)
        values = {"param": master.detach()} | {moment: state[moment] for moment in MOMENTS}
        return {kind: tensor.view(-1).narrow(0, offset, length) for kind, tensor in values.items()}

    def _placements(self) -> Iterator[tuple[str, int, int, Tensor, int]]:
        """(name, start, stop in the local parameter, the optimizer's tensor that holds it, offset in that tensor)."""
        if self.stage == 0:
            pairs = [(p, p) for p in self.names]
            if not self.bare:
                low = [p for group in self.optimizer.fp16_groups for p in group]
                masters = [p for group in self.optimizer.fp32_groups for p in group]
                pairs = list(zip(low, masters, strict=True))
            for parameter, master in pairs:
                yield self.names[parameter], 0, parameter.numel(), master, 0
        elif self.stage == 3:
            for parameter, name in self.names.items():
                group, offset, padded = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
                start = min(self.context.data.rank * padded, parameter.ds_numel)
                stop = min(start + padded, parameter.ds_numel)
                yield name, start, stop, self.optimizer.fp32_partitioned_groups_flat[group], offset
        else:
            flat = getattr(self.optimizer, "fp32_groups_flat_partition", None)  # stage 1 in bf16
            flat = flat if flat is not None else self.optimizer.single_partition_of_fp32_groups
            for parameter, name in self.names.items():
                mapping = parameter._hp_mapping
                if mapping is not None:
                    start = mapping.lp_fragment_address.start
                    stop = start + mapping.lp_fragment_address.numel
                    yield name, start, stop, flat[mapping.param_group_index], mapping.hp_fragment_address.start

    @torch.no_grad()
    def refresh(self, optimizer_step: int) -> None:
        set_optimizer_step(self.inner, optimizer_step)
        if self.stage == 0 and not self.bare:
            for low, high in zip(self.optimizer.fp16_groups, self.optimizer.fp32_groups, strict=True):
                for parameter, master in zip(low, high, strict=True):
                    parameter.copy_(master)
        elif self.stage == 3:
            self.optimizer.parameter_offload.partition_all_parameters()
            self.partitioned_update.refresh()
        elif self.stage > 0:
            self.optimizer.update_lp_params()
