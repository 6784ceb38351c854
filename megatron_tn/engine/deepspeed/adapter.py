"""All uses of DeepSpeed, private attributes included: no other file imports deepspeed.

DeepSpeed provides the layout of masters and gradients (stages 0-2), gradient reduction (stages 0 and 2, and stage 1
without `sums_own_gradients`) and the gathering of partitioned parameters (stage 3). `engine.update` does clipping and
the optimizer step. The private attributes used here exist in DeepSpeed WRITTEN_FOR; other versions are refused.
"""

import contextlib
import inspect
import io
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_tn.config import ConfigError
from megatron_tn.engine.deepspeed.stage3 import BlockReduction
from megatron_tn.engine.shards import Placement
from megatron_tn.engine.update import StepResult
from megatron_tn.gradients.accumulator import Bucket
from megatron_tn.model.base import Model
from megatron_tn.parallel.collectives import gather_parts_
from megatron_tn.parallel.context import Axis, ParallelContext
from megatron_tn.parallel.sharding import mark

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")

import deepspeed

WRITTEN_FOR = "0.19.8"


def check_version(installed: str) -> None:
    """Raises ConfigError unless `installed` is the version whose internals this file knows."""
    if installed.partition("+")[0] != WRITTEN_FOR:
        raise ConfigError(
            f"deepspeed {installed} is installed, but megatron_tn/engine/deepspeed/adapter.py reaches into deepspeed "
            f"{WRITTEN_FOR}: install deepspeed=={WRITTEN_FOR}; or set WRITTEN_FOR there to {installed} and run "
            "tests/engine and tests/checkpoint, which compare every ZeRO stage with one process"
        )


check_version(deepspeed.__version__)  # before the imports below, which may not exist in another version

from deepspeed.runtime import bf16_optimizer, compiler  # noqa: E402
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK  # noqa: E402
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator  # noqa: E402
from deepspeed.utils import logger, safe_get_full_grad, set_z3_leaf_modules  # noqa: E402

logger.setLevel(logging.ERROR)  # its warnings concern settings that are intended here
# On a CPU DeepSpeed would compile a shared-memory all-reduce with g++ at start-up: 95 s, and a stale lock file if the
# process is killed. With that operator declared incompatible DeepSpeed uses gloo's all-reduce.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
# DeepSpeed's bf16 optimizer calls this for every parameter group: it runs gc.collect() and prints the memory in use.
bf16_optimizer.see_memory_usage = lambda *_, **__: None
# To look at an optimizer's type DeepSpeed imports its own Muon, whose functions are decorated with this torch.compile:
# TorchInductor would be imported for nothing, 1 s of every start
# (findings/deepspeed_imports_inductor_to_look_at_an_optimizer.sh).
compiler.compile = lambda: compiler.dummy_decorator


class ModelParallelUnit:
    """A `ParallelContext` as the `mpu` object that DeepSpeed expects.

    The data-parallel and sequence-data-parallel groups are both dp x cp: context-parallel ranks see different tokens of
    one sequence, so ZeRO must reduce gradients over them and may partition over them.
    """

    def __init__(self, context: ParallelContext):
        # DeepSpeed reads group=None as the whole world.
        self._tensor, self._data = context.tp.with_group(), context.data.with_group()

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


def refusal(settings: Mapping[str, Any]) -> str | None:
    """DeepSpeed's error message for a configuration (removed or unknown key, wrong value); None if it is accepted."""
    try:
        deepspeed.DeepSpeedConfig(dict(settings))
    except Exception as error:  # DeepSpeed's, pydantic's, AssertionError
        return " ".join(str(error).split())
    return None


def partition_parameters(model: Model, settings: dict, context: ParallelContext, device: torch.device) -> None:
    """Allocate each parameter of `model`, which is on the meta device, and partition it (ZeRO 3) before the next one is
    allocated. A block's parameters are gathered together when the block runs.

    `zero.Init` as a context manager does the same, but patches torch's tensor constructors for the whole process.
    """
    unit = ModelParallelUnit(context)
    # With gathering per submodule, a recomputed block would gather its weights for the second forward pass, free them,
    # and gather them again for the backward pass.
    set_z3_leaf_modules(model, list({type(block) for block in model.blocks}))
    partition, made = None, {}
    for module in model.modules():
        for name, empty in module.named_parameters(recurse=False):
            if empty not in made:
                made[empty] = mark(nn.Parameter(torch.empty_like(empty, device=device)), empty.shard_spec)
            parameter = made[empty]  # tied modules share one parameter
            module.register_parameter(name, parameter)
            if partition is None:
                with contextlib.redirect_stdout(io.StringIO()):
                    deepspeed.zero.Init(
                        module=module,
                        data_parallel_group=unit.get_data_parallel_group(),
                        config_dict_or_path=settings,
                        mpu=unit,
                    )
                partition = parameter.convert_to_zero_parameters
            else:
                partition(param_list=[parameter])


class Wrapped:
    """A model and a torch optimizer wrapped by `deepspeed.initialize`, and the calls on the DeepSpeed engine.

    optimizer: DeepSpeed's wrapper of the torch optimizer; at stage 0 in fp32 the torch optimizer itself.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict, context: ParallelContext, stage: int
    ):
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        self.stage = stage
        self.data = context.data
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=settings,
            mpu=ModelParallelUnit(context),
            dist_init_required=False,
        )

    def begin_microbatch(self, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`; after the last microbatch they are summed over data-parallel ranks.

        At stages 0-2 DeepSpeed divides gradients by the number of ranks; multiplying the loss by it cancels that.
        Stage 3 reduces with `BlockReduction`, which does not divide.
        """
        averaged_over = 1 if self.stage == 3 else self.data.size
        self.engine.backward(loss * averaged_over, scale_wrt_gas=False)

    def count_microbatch(self) -> None:
        """Advance DeepSpeed's microbatch counter; called after every microbatch but the step's last."""
        self.engine.step()

    def step(self, apply: Callable[[], StepResult]) -> StepResult:
        """`engine.step()` with optimizer.step replaced by `apply`; DeepSpeed still advances its counters and monitors
        and clears gradients."""
        optimizer, found = self.optimizer, []

        def update() -> None:
            found.append(apply())
            optimizer._global_grad_norm, optimizer.overflow = found[0].grad_norm, not found[0].applied

        optimizer.step = update
        self.engine.step()
        return found[0]

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """After the last microbatch: the gradient of this rank's tensor-parallel part, flat. Collective."""
        return safe_get_full_grad(parameter).view(-1)

    def free_gathered(self) -> None:
        """Stage 3: free the parameters that a forward pass gathered, keeping this rank's partitions."""
        self.optimizer.parameter_offload.partition_all_parameters()

    def release(self) -> None:
        """Free parameters, masters and optimizer state. Otherwise they live as long as the process: DeepSpeed sets
        attributes on parameters that refer back to them, and at stage 3 FWD_MODULE_STACK and a cached method refer to
        the engine."""
        self.engine.destroy()
        for parameter in self.names:
            vars(parameter).clear()
        FWD_MODULE_STACK.clear()
        cached = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
        inspect.getclosurevars(cached).nonlocals["func"].cache_clear()


class Stage0Shards:
    """See `engine.shards.Shards`. Every rank holds one master per parameter, as in `engine.replicated`. Gradients are
    `parameter.grad`, all-reduced by DeepSpeed. In fp32 a parameter is its own master."""

    sharded_over = Axis()
    whole = ()

    def __init__(self, wrapped: Wrapped):
        self.parameters = list(wrapped.names)
        self.masters: list[Tensor] = self.parameters
        if hasattr(wrapped.optimizer, "fp32_groups"):
            self.parameters = [parameter for group in wrapped.optimizer.fp16_groups for parameter in group]
            self.masters = [master for group in wrapped.optimizer.fp32_groups for master in group]
        pairs = zip(self.masters, self.parameters, strict=True)
        self.copies = {master: parameter for master, parameter in pairs if master is not parameter}
        self.placements = [
            Placement(wrapped.names[parameter], 0, parameter.numel(), master=index, offset=0)
            for index, parameter in enumerate(self.parameters)
        ]

    def gradients(self) -> list[Tensor]:
        return [parameter.grad.float() for parameter in self.parameters]

    def clear(self) -> None:
        """Nothing to do: `engine.step()` clears the parameters' gradients."""

    def publish(self) -> None:
        """Nothing to do: every rank has applied the same update to all parameters."""


class _FlatShards:
    """Stages 1 and 2: each optimizer group is one flat tensor, of which rank n of dp x cp holds the nth equal part."""

    def __init__(self, wrapped: Wrapped, masters: list[Tensor], whole: list[Tensor]):
        self.optimizer = wrapped.optimizer
        self.sharded_over = wrapped.data
        self.masters = masters
        self.whole = whole  # per group: its parameters in the computing type, flat; the model's parameters are views
        parts = [flat.chunk(wrapped.data.size)[wrapped.data.rank] for flat in whole]
        self.copies = dict(zip(masters, parts, strict=True))
        self.placements = [
            Placement(name, low.start, low.start + low.numel, mapping.param_group_index, high.start)
            for parameter, name in wrapped.names.items()
            if (mapping := parameter._hp_mapping) is not None  # None: this rank owns no element of the parameter
            for low, high in [(mapping.lp_fragment_address, mapping.hp_fragment_address)]
        ]

    def publish(self) -> None:
        gather_parts_(self.whole, self.sharded_over)


class Stage1Shards(_FlatShards):
    """See `engine.shards.Shards`. DeepSpeed's BF16_Optimizer; `GradientAccumulator` sums gradients in its fp32 buffers.
    DeepSpeed itself would keep all bf16 gradients until the backward pass ends, then cast each to fp32 and add it."""

    def __init__(self, wrapped: Wrapped):
        optimizer = wrapped.optimizer
        super().__init__(wrapped, optimizer.fp32_groups_flat_partition, optimizer.bf16_groups_flat)
        self.buckets = [
            Bucket(parameters, flat)
            for parameters, flat in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients_flat, strict=True)
        ]
        for bucket in self.buckets:
            for parameter, view in zip(bucket.parameters, bucket.sums(), strict=True):
                parameter._hp_grad = view.view(-1)  # read by `safe_get_full_grad`
        optimizer.clear_hp_grads = lambda: None  # the next step's first addition overwrites them

    def gradients(self) -> list[Tensor]:
        return self.optimizer.fp32_groups_gradient_flat_partition

    def clear(self) -> None:
        """Nothing to do: the next step's first addition overwrites the sums."""


class Stage2Shards(_FlatShards):
    """See `engine.shards.Shards`. DeepSpeed's optimizer of stage 2, and of stage 1 without `sums_own_gradients`. It
    reduces gradients in buckets during the backward pass, each partition to the rank that updates it."""

    def __init__(self, wrapped: Wrapped):
        optimizer = wrapped.optimizer
        super().__init__(wrapped, optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups_flat)

    def gradients(self) -> list[Tensor]:
        return [self._flat(group).to(master.dtype) for group, master in enumerate(self.masters)]

    def _flat(self, group: int) -> Tensor:
        flat = self.optimizer._get_preflattened_grad_partition(group)
        return self.optimizer.flatten(self.optimizer.averaged_gradients[group]) if flat is None else flat

    def clear(self) -> None:
        optimizer = self.optimizer
        optimizer._release_preflattened_grad_buffers()
        for group in range(len(self.masters)):
            optimizer.averaged_gradients[group] = optimizer.all_grad_tensors[group] = None
        optimizer.micro_step_id = -1  # DeepSpeed increments it to 0 in the first microbatch


class Stage3Shards:
    """See `engine.shards.Shards`. Each parameter is cut into equal parts over dp x cp; this rank's parts of many
    parameters lie in one flat master. `BlockReduction` replaces DeepSpeed's gradient reduction."""

    def __init__(self, wrapped: Wrapped):
        optimizer = self.optimizer = wrapped.optimizer
        self.sharded_over = wrapped.data
        self.masters = optimizer.fp32_partitioned_groups_flat
        # DeepSpeed puts a master into the torch optimizer only while it steps; `Update` needs all masters there always.
        groups = optimizer.optimizer.param_groups
        for index, master in enumerate(self.masters):
            groups[optimizer.sub_group_to_group_id[index]]["params"].append(master)
        pairs = zip(self.masters, optimizer.fp16_partitioned_groups_flat, strict=True)
        self.copies = {master: part for master, part in pairs if master is not part}
        self.placements = [self._placement(parameter, name) for parameter, name in wrapped.names.items()]
        self.sums = optimizer.grad_partitions_flat_buffer  # this rank's parts of all gradients, in the masters' order
        parameters = [parameter for group in optimizer.fp16_groups for parameter in group]
        lengths = [parameter.partition_numel() for parameter in parameters]
        self.reduction = BlockReduction(
            dict(zip(parameters, self.sums.split(lengths), strict=True)),
            self.sums,
            optimizer.dp_process_group,
            stream=optimizer.reduce_and_partition_stream if self.sums.is_cuda else None,
            block_of=lambda parameter: getattr(parameter, "ds_z3_leaf_module", None),
            first_microbatch=lambda: optimizer.micro_step_id == 0,
        )
        optimizer.reduce_ready_partitions_and_remove_grads = self.reduction.take
        optimizer.independent_gradient_partition_epilogue = self._end_backward

    def _placement(self, parameter: nn.Parameter, name: str) -> Placement:
        master, offset, padded = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        start = min(self.sharded_over.rank * padded, parameter.ds_numel)
        return Placement(name, start, min(start + padded, parameter.ds_numel), master, offset)

    def _end_backward(self) -> None:
        self.reduction.wait()
        self.optimizer._epilogue_ran_this_backward = True  # the next forward pass then counts a microbatch

    def gradients(self) -> list[Tensor]:
        self.optimizer._pre_step()  # resets the microbatch counter
        self.optimizer._partition_all_parameters()
        lengths = [master.numel() for master in self.masters]
        return [flat.to(torch.float32) for flat in self.sums.split(lengths)]

    def clear(self) -> None:
        """Nothing to do: the next step's first microbatch overwrites the sums."""

    def publish(self) -> None:
        if whole := self.optimizer.persistent_parameters:  # small parameters that every rank keeps whole
            whole[0].all_gather(whole)
        self.optimizer.invalidate_secondary_tensor()
