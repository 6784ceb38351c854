"""PyTorch FSDP2 (torch.distributed.fsdp.fully_shard; arXiv 2304.11277): parameters, gradients and optimizer sharded.

Each block's parameters are gathered before the block runs and freed after it. The sharded fp32 parameters are the
masters: FSDP2 casts them to the computing type when it gathers them, and reduces gradients in fp32. FSDP2 shards the
rows of this tensor-parallel rank's part over dp x cp.
"""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from megatron_tn.config import TrainConfig
from megatron_tn.engine.base import DTYPES, UpdatingEngine, build_update
from megatron_tn.engine.shards import Placement
from megatron_tn.model.base import Model
from megatron_tn.parallel.context import Axis
from megatron_tn.parallel.sharding import mark


class FSDP2Engine(UpdatingEngine):
    """See `engine.base.Engine`. `model` has fp32 parameters on the meta device; they are allocated after sharding."""

    partitioned = True

    def __init__(self, model: Model, config: TrainConfig, device: torch.device):
        super().__init__()
        self.model = model
        self.context = model.context
        names = [name for name, _ in model.named_parameters()]
        specs = [parameter.shard_spec for parameter in model.parameters()]
        sharding = {
            "mesh": _mesh(self.context.data, device),
            # Decay rates, positions and states are inputs of the blocks; FSDP2 must not cast them.
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=DTYPES[config.engine.precision], reduce_dtype=torch.float32, cast_forward_inputs=False
            ),
            "reshard_after_forward": config.engine.reshard_after_forward,
        }
        for block in model.blocks:
            fully_shard(block, **sharding)
        # The tied embedding is used by the first operation and by the last (the output head): never free it in between.
        fully_shard(model, **(sharding | {"reshard_after_forward": False}))
        model.register_forward_hook(_free_after_evaluation)
        model.to_empty(device=device)
        # fully_shard replaced the parameters by DTensors, which lack the ShardSpec marks.
        parameters = {name: mark(new, spec) for name, new, spec in zip(names, model.parameters(), specs, strict=True)}
        self.update = build_update(model, FSDP2Shards(parameters, self.context.data), config)

    def _forward_backward(
        self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor | None, scale: Tensor, last: bool
    ) -> Tensor:
        loss = self.model(tokens, targets=targets, cu_seqlens=cu_seqlens, reduction="sum").loss * scale
        # FSDP2 divides gradients by the number of ranks; multiplying the loss by it cancels that. FSDP2 reduces after
        # every microbatch, so only the fp32 gradient shard accumulates.
        (loss * self.context.data.size).backward()
        return loss.detach()

    def named_logical_gradients(self) -> dict[str, Tensor]:
        return {
            name: parameter.shard_spec.gather(parameter.grad.full_tensor(), self.context.tp)
            for name, parameter in self.model.named_parameters()
        }


class FSDP2Shards:
    """See `engine.shards.Shards`. This rank's rows of each parameter, as plain views of FSDP2's DTensors."""

    def __init__(self, parameters: dict[str, nn.Parameter], data: Axis):
        self.copies: dict[Tensor, Tensor] = {}  # none: FSDP2 casts the masters when it gathers them
        self.sharded_over = data
        self.parameters = list(parameters.values())
        self.masters = [nn.Parameter(parameter.to_local().detach()) for parameter in self.parameters]
        self.placements = []
        for index, (name, parameter) in enumerate(parameters.items()):
            rows = parameter.shape[0]
            start = min(data.rank * -(-rows // data.size), rows) * (parameter.numel() // rows)
            self.placements.append(Placement(name, start, start + self.masters[index].numel(), master=index, offset=0))

    def gradients(self) -> list[Tensor]:
        return [parameter.grad.to_local() for parameter in self.parameters]

    def clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def publish(self) -> None:
        """Nothing to do: the next forward pass gathers the masters."""


def _free_after_evaluation(model: Model, inputs, output) -> None:
    """Free the weights gathered by a forward pass without a backward pass. Otherwise FSDP2 keeps the gathered weights
    registered in place of the shards: a save would miss the shards, and the first forward pass after a load would use
    the old weights."""
    if torch.is_grad_enabled():
        return
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _mesh(axis: Axis, device: torch.device) -> DeviceMesh:
    return DeviceMesh.from_group(axis.with_group().group, device.type)
