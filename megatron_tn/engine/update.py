"""Optimizer step of every engine: gradient norm -> clipping -> optimizer -> computing-type copies -> all-gather.

Engines differ in the masters and gradients that a rank holds (`Shards`) and in the gradient reduction. All code after
the reduction is here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_tn.config import ConfigError
from megatron_tn.device.host_copy import HostCopy
from megatron_tn.gradients.clipping import clipping_divisor
from megatron_tn.gradients.norm import gradient_norm
from megatron_tn.optim.adamw import write_copies
from megatron_tn.optim.protocol import Optimizer
from megatron_tn.parallel.context import Axis
from megatron_tn.parallel.sharding import OwnedRange, ShardSpec


class StepResult(NamedTuple):
    """grad_norm: global gradient norm before clipping. applied: False if grad_norm was not finite: update skipped."""

    grad_norm: float
    applied: bool


class Placement(NamedTuple):
    """Elements [start, stop) of parameter `name`, flattened as this tensor-parallel rank holds it, lie in
    masters[master], flattened, from `offset` on."""

    name: str
    start: int
    stop: int
    master: int
    offset: int

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """View [stop - start] of this placement's elements. tensors: one per master, of the master's shape."""
        return tensors[self.master].view(-1).narrow(0, self.offset, self.stop - self.start)


class Shards(Protocol):
    """The masters that a rank updates.

    masters: the optimizer's fp32 tensors, of any shape; one master may hold several parameters.
    copies: master -> the same elements in the computing type, of the master's shape; no entry for a master that the
    model computes with directly.
    placements: position of every parameter's elements in the masters; padding of a master belongs to no placement.
    sharded_over: the axis over whose ranks the elements are partitioned; of size 1 where every rank holds all.
    """

    masters: Sequence[Tensor]
    copies: Mapping[Tensor, Tensor]
    placements: Sequence[Placement]
    sharded_over: Axis

    def gradients(self) -> Sequence[Tensor]:
        """After the last microbatch: one fp32 gradient per master, of the master's shape, summed over ranks."""
        ...

    def clear(self) -> None:
        """Clear the gradients, after an applied or a skipped update."""
        ...

    def publish(self) -> None:
        """After a change of masters and copies: update the model's parameters on every rank. Collective."""
        ...


class Update:
    """Clips and applies gradients. specs: parameter name -> its split over tensor parallelism.

    Raises:
        ConfigError: the optimizer has `whole_matrices`, and a master is not one whole parameter.
    """

    def __init__(
        self, optimizer: Optimizer, shards: Shards, specs: Mapping[str, ShardSpec], tp: Axis, *, clip_norm: float
    ):
        self.optimizer = optimizer
        self.shards = shards
        self.specs = specs
        self.tp = tp
        self.clip_norm = clip_norm
        optimizer.copies = shards.copies
        if optimizer.whole_matrices:
            self._check_whole_matrices()

    @torch.no_grad()
    def step(self, lr: float, tokens: Tensor | None = None) -> StepResult:
        """Apply the gradients with learning rate `lr`. All ranks take the same decision. Collective.

        tokens: number of target tokens of the step over all ranks, [] on the device; the host need not have read it. If
        0, the norm is set to NaN and nothing changes.
        """
        shards, masters = self.shards, self.shards.masters
        gradients = shards.gradients()
        placed = [place for place in shards.placements if place.stop > place.start]
        pieces = [(self.specs[place.name], place.of(gradients)) for place in placed]
        norm = gradient_norm(pieces, self.tp, masters[0].device, sharded_over=shards.sharded_over)
        if tokens is not None:
            norm = torch.where(tokens > 0, norm, torch.nan)
        on_host = HostCopy(norm)  # queued before the update: `read` waits for the norm only
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = gradient
        self.optimizer.step(lr, clipping_divisor(norm, self.clip_norm))
        for master in masters:
            master.grad = None
        found = on_host.read().item()
        shards.clear()
        if not found < float("inf"):
            self.optimizer.undo()
            return StepResult(found, False)
        shards.publish()
        return StepResult(found, True)

    def _check_whole_matrices(self) -> None:
        for place in self.shards.placements:
            size = math.prod(self.specs[place.name].local_shape(self.tp.rank, self.tp.size))
            if (place.stop - place.start, self.shards.masters[place.master].numel()) != (size, size):
                raise ConfigError(
                    f"{type(self.optimizer).__name__} updates whole matrices, but this engine keeps {place.name} "
                    "in parts or beside other parameters"
                )

    def owned_ranges(self) -> list[OwnedRange]:
        """Views of the masters and optimizer state that this rank updates, one `OwnedRange` per placement."""
        masters = self.shards.masters
        states = [self.optimizer.state_of(master) for master in masters]
        kinds = {"param": [master.detach() for master in masters]}
        kinds |= {kind: [state[kind] for state in states] for kind in self.optimizer.state_kinds}
        return [
            OwnedRange(place.name, place.start, place.stop, {kind: place.of(held) for kind, held in kinds.items()})
            for place in self.shards.placements
        ]

    @torch.no_grad()
    def refresh(self, optimizer_step: int) -> None:
        """After a write to the owned ranges: copy the masters to the model's parameters on every rank, and set the
        optimizer's step count to `optimizer_step`. Collective."""
        self.optimizer.set_step(optimizer_step)
        write_copies(self.shards.copies)
        self.shards.publish()
