"""engine=zero0 .. zero3: DeepSpeed ZeRO (arXiv 1910.02054), the main engine.

The loss is divided by the step's target tokens over all ranks, so gradients are summed over ranks, never averaged.
If `EngineConfig.sums_own_gradients` (stage 1 in bf16 with fp32 gradient sums), `GradientAccumulator` sums and reduces
gradients; otherwise DeepSpeed's `engine.backward` does. adapter.py describes DeepSpeed's buffers.
"""

import torch
from torch import Tensor, nn

from megatron_tn.config import TrainConfig
from megatron_tn.device.streams import on_stream
from megatron_tn.engine.base import DTYPES, UpdatingEngine
from megatron_tn.engine.deepspeed.adapter import (
    Stage0Shards,
    Stage1Shards,
    Stage2Shards,
    Stage3Shards,
    Wrapped,
    partition_parameters,
)
from megatron_tn.engine.deepspeed.settings import deepspeed_settings
from megatron_tn.engine.passes import build_passes, capture_stream
from megatron_tn.engine.update import StepResult, Update
from megatron_tn.gradients.accumulator import GradientAccumulator, split_into_buckets
from megatron_tn.model.base import Model
from megatron_tn.model.registry import build_model
from megatron_tn.optim.build import build_optimizer
from megatron_tn.optim.groups import parameter_groups
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.parallel.float8_layers import layer_groups, marked_layers
from megatron_tn.parallel.world import release_on_leaving


def partitioned_model(config: TrainConfig, context: ParallelContext, device: torch.device) -> Model:
    """A model for ZeRO 3: each parameter is allocated and partitioned before the next one is allocated."""
    model = build_model(config.model, context, "meta", DTYPES[config.engine.precision])
    partition_parameters(model, deepspeed_settings(config, context.dp.size), context, device)
    return model


def _apart(parameters: list[nn.Parameter], chosen: set[nn.Parameter]) -> list[list[nn.Parameter]]:
    """[parameters not in `chosen`, parameters in it], without an empty list."""
    parts = [[p for p in parameters if (p in chosen) == wanted] for wanted in (False, True)]
    return [part for part in parts if part]


class DeepSpeedEngine(UpdatingEngine):
    """See `engine.base.Engine`."""

    def __init__(self, model: Model, config: TrainConfig):
        super().__init__()
        self.model = model
        self.context = model.context
        self.stage = config.engine.zero_stage
        self.partitioned = self.stage > 0
        # Dimensions of the logical parameter, not of `p`: ZeRO 3 has already flattened `p`.
        named = [(name, p, len(p.shard_spec.shape)) for name, p in model.named_parameters()]
        groups = parameter_groups(named, config.optim)
        # DeepSpeed makes one flat tensor per optimizer group. Each serves as a bucket of `GradientAccumulator`; weights
        # that are kept in fp8 have their own, made and freed one by one (engine/freed_weights.py).
        float8 = layer_groups(marked_layers(model)) if self.stage in (1, 2) else []
        weights = {layer.weight for members in float8 for layer in members}
        follow = {layer.weight for members in float8 for layer in members[1:]}
        groups = [
            group | {"params": members}
            for group in groups
            for part in _apart(group["params"], weights)
            for members in (
                split_into_buckets(part, config.engine.reduce_bucket_elements, follow)
                if config.engine.sums_own_gradients or part[0] in weights
                else [part]
            )
        ]
        optimizer = build_optimizer(groups, config.optim, DTYPES[config.engine.precision])
        device = next(model.parameters()).device
        stream = capture_stream(device) if config.engine.cuda_graph else None
        settings = deepspeed_settings(config, self.context.dp.size) | {"gradient_clipping": 0.0}  # `Update` clips
        # DeepSpeed's bf16 optimizer keeps autograd nodes, which are bound to the stream they were created on.
        with on_stream(stream):
            self.wrapped = Wrapped(model, optimizer.inner, settings, self.context, self.stage)
        release_on_leaving(self.wrapped)
        self.passes = None
        if config.engine.sums_own_gradients:
            shards = Stage1Shards(self.wrapped)
            accumulator = GradientAccumulator(shards.buckets, self.context.data, partitioned=True)
            self.passes = build_passes(model, accumulator, cuda_graph=config.engine.cuda_graph, stream=stream)
        else:
            shards = {0: Stage0Shards, 1: Stage2Shards, 2: Stage2Shards, 3: Stage3Shards}[self.stage](self.wrapped)
        self.update = Update(optimizer, shards, model.shard_specs(), self.context.tp, clip_norm=config.optim.clip_norm)

    def _forward_backward(
        self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor | None, scale: Tensor, last: bool
    ) -> Tensor:
        self.wrapped.begin_microbatch(last)
        if self.passes is not None:
            loss = self.passes(tokens, targets, cu_seqlens, scale, last)
        else:
            out = self.wrapped.engine(tokens, targets=targets, cu_seqlens=cu_seqlens, reduction="sum")
            loss = out.loss * scale
            self.wrapped.backward(loss)
        if not last:
            self.wrapped.count_microbatch()
        return loss.detach()

    def _step(self, lr: float, tokens: Tensor | None) -> StepResult:
        return self.wrapped.step(lambda: self.update.step(lr, tokens))

    def named_logical_gradients(self) -> dict[str, Tensor]:
        found = {}
        for name, parameter in self.model.named_parameters():
            spec, tp = parameter.shard_spec, self.context.tp
            local = self.wrapped.gradient(parameter).view(spec.local_shape(tp.rank, tp.size))
            found[name] = spec.gather(local, tp)
        return found

    def refresh(self, optimizer_step: int) -> None:
        if self.stage == 3:
            self.wrapped.free_gathered()
        self.update.refresh(optimizer_step)
