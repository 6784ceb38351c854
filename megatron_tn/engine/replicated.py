"""engine=local: bf16 or fp32 parameters, and all fp32 masters and optimizer state on every data-parallel rank.

Nothing is sharded over data parallelism; tests compare the other engines with this one.
"""

import torch
from torch import Tensor, nn

from megatron_tn.config import TrainConfig
from megatron_tn.engine.base import UpdatingEngine, build_update
from megatron_tn.engine.passes import build_passes, capture_stream
from megatron_tn.engine.shards import Placement
from megatron_tn.gradients.accumulator import Bucket, GradientAccumulator, split_into_buckets
from megatron_tn.model.base import Model
from megatron_tn.parallel.context import Axis


class ReplicatedEngine(UpdatingEngine):
    """See `engine.base.Engine`. Gradients are summed in fp32, in buckets that are all-reduced one by one."""

    partitioned = False

    def __init__(self, model: Model, config: TrainConfig):
        super().__init__()
        self.model = model
        self.context = model.context
        named = dict(model.named_parameters())
        parameters = list(named.values())
        device = parameters[0].device
        buckets = [
            Bucket(members, torch.empty(sum(parameter.numel() for parameter in members), device=device))
            for members in split_into_buckets(parameters, config.engine.reduce_bucket_elements)
        ]
        accumulator = GradientAccumulator(buckets, self.context.data)
        self.passes = build_passes(
            model, accumulator, cuda_graph=config.engine.cuda_graph, stream=capture_stream(device)
        )
        self.update = build_update(model, ReplicatedShards(named), config)

    def _forward_backward(
        self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor | None, scale: Tensor, last: bool
    ) -> Tensor:
        return self.passes(tokens, targets, cu_seqlens, scale, last)

    def named_logical_gradients(self) -> dict[str, Tensor]:
        return {
            name: parameter.shard_spec.gather(parameter.gradient_sum.value, self.context.tp)
            for name, parameter in self.model.named_parameters()
        }


class ReplicatedShards:
    """See `engine.shards.Shards`. One master per parameter; an fp32 parameter is its own master."""

    sharded_over = Axis()
    whole = ()

    def __init__(self, named: dict[str, nn.Parameter]):
        self.parameters = list(named.values())
        self.masters = [
            parameter if parameter.dtype == torch.float32 else nn.Parameter(parameter.detach().float())
            for parameter in self.parameters
        ]
        pairs = zip(self.masters, self.parameters, strict=True)
        self.copies = {master: parameter for master, parameter in pairs if master is not parameter}
        self.placements = [
            Placement(name, 0, parameter.numel(), master=index, offset=0)
            for index, (name, parameter) in enumerate(named.items())
        ]

    def gradients(self) -> list[Tensor]:
        return [parameter.gradient_sum.value for parameter in self.parameters]

    def clear(self) -> None:
        """Nothing to do: the next step's first addition overwrites the sums."""

    def publish(self) -> None:
        """Nothing to do: every rank has applied the same update to all parameters."""
