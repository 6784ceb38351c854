"""PyTorch FSDP2 (torch.distributed.fsdp.fully_shard; arXiv 2304.11277): parameters, gradients and optimizer sharded.

Each block's parameters are gathered before it runs and freed after. The sharded parameters are fp32 and so are the
masters themselves: they are cast to the computing type as they are gathered, and gradients are reduced in fp32. Rows of
a parameter are dealt out over dp x cp, after tensor parallelism took its part.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from megatron_tn.config import TrainConfig
from megatron_tn.engine.base import DTYPES, MOMENTS, StepResult, optimizer_state, set_optimizer_step
from megatron_tn.engine.clipping import clipped_step
from megatron_tn.model.transnormer import TransNormerLM
from megatron_tn.optim.groups import build_adamw, parameter_groups
from megatron_tn.parallel.context import Axis
from megatron_tn.parallel.gradients import gradient_norm
from megatron_tn.parallel.sharding import OwnedRange, mark


class FSDP2Engine:
    """See `engine.base.Engine`. `model` has fp32 parameters on the meta device; they get storage once sharded."""

    partitioned = True

    def __init__(self, model: TransNormerLM, config: TrainConfig, device: torch.device):
        self.model = model
        self.context = model.context
        self.clip_norm = config.optim.clip_norm
        named = list(model.named_parameters())
        self.names = [name for name, _ in named]
        self.specs = [parameter.shard_spec for _, parameter in named]
        sharding = {
            "mesh": _mesh(self.context.data, device),
            # Rates, positions and states are inputs of the blocks and keep the type they come in.
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=DTYPES[config.engine.precision], reduce_dtype=torch.float32, cast_forward_inputs=False
            ),
            "reshard_after_forward": config.engine.reshard_after_forward,
        }
        for block in model.model.layers:
            fully_shard(block, **sharding)
        # The embedding, which is the head as well, is needed from the first operation to the last.
        fully_shard(model, **(sharding | {"reshard_after_forward": False}))
        model.register_forward_hook(_free_after_evaluation)
        model.to_empty(device=device)
        # FSDP put parameters of its own in place of the model's.
        self.parameters = [mark(new, spec) for new, spec in zip(model.parameters(), self.specs, strict=True)]
        # The optimizer sees plain tensors over the same storage, as the other engines' do.
        self.masters = [nn.Parameter(parameter.to_local().detach()) for parameter in self.parameters]
        dimensions = [parameter.dim() for parameter in self.parameters]
        groups = parameter_groups(zip(self.names, self.masters, dimensions, strict=True), config.optim.weight_decay)
        self.optimizer = build_adamw(groups, config.optim)

    def forward_backward(
        self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor | None, *, scale: Tensor, last: bool
    ) -> Tensor:
        loss = self.model(tokens, targets=targets, cu_seqlens=cu_seqlens, reduction="sum").loss * scale
        # FSDP will divide by the number of ranks. Gradients are reduced after every microbatch: what accumulates is
        # the shard, in fp32.
        (loss * self.context.data.size).backward()
        return loss.detach()

    @torch.no_grad()
    def step(self, lr: float) -> StepResult:
        gradients = [parameter.grad.to_local() for parameter in self.parameters]
        device = gradients[0].device
        pairs = zip(self.specs, gradients, strict=True)
        norm = gradient_norm(pairs, self.context.tp, device, sharded_over=self.context.data)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient
        norm = clipped_step(self.optimizer, norm, self.clip_norm)
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.grad = master.grad = None
        return StepResult(norm, norm < float("inf"))

    def named_logical_gradients(self) -> dict[str, Tensor]:
        return {
            name: spec.gather(parameter.grad.full_tensor(), self.context.tp)
            for name, spec, parameter in zip(self.names, self.specs, self.parameters, strict=True)
        }

    def owned_ranges(self) -> list[OwnedRange]:
        ranges = []
        rank, size = self.context.data.rank, self.context.data.size
        for name, parameter, master in zip(self.names, self.parameters, self.masters, strict=True):
            rows = parameter.shape[0]
            row = parameter.numel() // rows
            start = min(rank * -(-rows // size), rows) * row
            state = optimizer_state(self.optimizer, master)
            values = {"param": master.detach().view(-1)} | {moment: state[moment].view(-1) for moment in MOMENTS}
            ranges.append(OwnedRange(name, start, start + master.numel(), values))
        return ranges

    def refresh(self, optimizer_step: int) -> None:
        set_optimizer_step(self.optimizer, optimizer_step)


def _free_after_evaluation(model: TransNormerLM, inputs, output) -> None:
    """Weights that wait for a backward pass which does not come would stand in the shards' place: a save would miss
    the shards, and after a load the next forward pass would still take the old weights."""
    if torch.is_grad_enabled():
        return
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _mesh(axis: Axis, device: torch.device) -> DeviceMesh:
    group = axis.group or dist.new_group([dist.get_rank()], use_local_synchronization=True)
    return DeviceMesh.from_group(group, device.type)
