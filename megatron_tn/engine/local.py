"""The engine without a framework: bf16 or fp32 parameters, fp32 masters on every data-parallel rank.

It shards nothing, so it is the shortest statement of what every other engine must equal.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_tn.config import TrainConfig
from megatron_tn.engine.base import MOMENTS, StepResult, optimizer_state, set_optimizer_step
from megatron_tn.engine.clipping import clipped_step
from megatron_tn.engine.passes import CapturedPasses, Passes, capture_stream
from megatron_tn.model.transnormer import TransNormerLM
from megatron_tn.optim.adamw import FusedAdamW
from megatron_tn.optim.groups import build_adamw, parameter_groups
from megatron_tn.parallel.gradients import gradient_norm
from megatron_tn.parallel.main_gradient import attach
from megatron_tn.parallel.reduction import OverlappedReduction, buckets
from megatron_tn.parallel.sharding import OwnedRange


class LocalEngine:
    """See `engine.base.Engine`. Gradients accumulate in fp32, in flat buffers that are reduced one by one."""

    partitioned = False

    def __init__(self, model: TransNormerLM, config: TrainConfig):
        self.model = model
        self.context = model.context
        self.clip_norm = config.optim.clip_norm
        named = list(model.named_parameters())
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        # An fp32 parameter is its own master; a bf16 one gets a copy.
        self.masters = [
            parameter if parameter.dtype == torch.float32 else nn.Parameter(parameter.detach().float())
            for parameter in self.parameters
        ]
        device = self.parameters[0].device
        reduced = []
        for members in buckets(self.parameters, config.engine.reduce_bucket_elements):
            sizes = [parameter.numel() for parameter in members]
            flat = torch.empty(sum(sizes), device=device)
            for parameter, part in zip(members, flat.split(sizes), strict=True):
                attach(parameter, part.view_as(parameter))
            reduced.append((members, flat))
        mains = [parameter.main_gradient for parameter in self.parameters]
        self.gradients = [main.sum for main in mains]
        reduction = OverlappedReduction(reduced, self.context.data)
        self.passes = Passes(model, mains, reduction)
        if config.engine.cuda_graph:
            self.passes = CapturedPasses(model, mains, reduction, capture_stream(device))
        dimensions = [parameter.dim() for parameter in self.parameters]
        groups = parameter_groups(zip(self.names, self.masters, dimensions, strict=True), config.optim.weight_decay)
        self.optimizer = build_adamw(groups, config.optim)
        if isinstance(self.optimizer, FusedAdamW) and self.parameters[0] is not self.masters[0]:
            self.optimizer.copies = dict(zip(self.masters, self.parameters, strict=True))

    def forward_backward(
        self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor | None, *, scale: Tensor, last: bool
    ) -> Tensor:
        return self.passes(tokens, targets, cu_seqlens, scale, last)

    @torch.no_grad()
    def step(self, lr: float) -> StepResult:
        specs = [parameter.shard_spec for parameter in self.parameters]
        norm = gradient_norm(zip(specs, self.gradients, strict=True), self.context.tp, self.parameters[0].device)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for master, gradient in zip(self.masters, self.gradients, strict=True):
            master.grad = gradient
        norm = clipped_step(self.optimizer, norm, self.clip_norm)
        if not isinstance(self.optimizer, FusedAdamW):
            self._copy_masters()
        for master in self.masters:
            master.grad = None
        return StepResult(norm, norm < float("inf"))

    def named_logical_gradients(self) -> dict[str, Tensor]:
        return {
            name: parameter.shard_spec.gather(gradient, self.context.tp)
            for name, parameter, gradient in zip(self.names, self.parameters, self.gradients, strict=True)
        }

    def owned_ranges(self) -> list[OwnedRange]:
        ranges = []
        for name, master in zip(self.names, self.masters, strict=True):
            state = optimizer_state(self.optimizer, master)
            values = {"param": master.detach().view(-1)} | {moment: state[moment].view(-1) for moment in MOMENTS}
            ranges.append(OwnedRange(name, 0, master.numel(), values))
        return ranges

    def refresh(self, optimizer_step: int) -> None:
        set_optimizer_step(self.optimizer, optimizer_step)
        self._copy_masters()

    @torch.no_grad()
    def _copy_masters(self) -> None:
        if self.parameters[0] is not self.masters[0]:
            torch._foreach_copy_(self.parameters, self.masters)
