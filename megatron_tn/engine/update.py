"""Optimizer step of every engine: gradient norm -> clipping -> optimizer -> computing-type copies -> all-gather.

Engines differ in the masters and gradients that a rank holds (`Shards`) and in the gradient reduction. All code after
the reduction is here.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_tn.device.host_copy import HostCopy
from megatron_tn.engine.freed_weights import FreedWeights
from megatron_tn.engine.matrix_rounds import matrix_rounds
from megatron_tn.engine.shards import Shards
from megatron_tn.gradients.clipping import clipping_divisor
from megatron_tn.gradients.norm import gradient_norm
from megatron_tn.optim.adamw import write_copies
from megatron_tn.optim.protocol import Optimizer
from megatron_tn.parallel.context import Axis
from megatron_tn.parallel.linear import SplitLinear
from megatron_tn.parallel.sharding import OwnedRange, ShardSpec


class StepResult(NamedTuple):
    """grad_norm: global gradient norm before clipping. applied: False if grad_norm was not finite: update skipped."""

    grad_norm: float
    applied: bool


class Update:
    """Clips and applies gradients. specs: parameter name -> its split over tensor parallelism. Building it is
    collective.

    float8: the weights that are kept in fp8, set by `keep_in_float8`.

    Raises:
        ConfigError: the optimizer has `whole_matrices`, and a matrix is replicated over tensor-parallel ranks.
    """

    def __init__(
        self, optimizer: Optimizer, shards: Shards, specs: Mapping[str, ShardSpec], tp: Axis, *, clip_norm: float
    ):
        self.optimizer = optimizer
        self.shards = shards
        self.specs = specs
        self.tp = tp
        self.clip_norm = clip_norm
        self.float8: FreedWeights | None = None
        optimizer.copies = shards.copies
        if optimizer.whole_matrices:
            optimizer.rounds = matrix_rounds(shards, specs, tp, heads_apart=optimizer.heads_apart)

    @torch.no_grad()
    def step(self, lr: float, tokens: Tensor | None = None) -> StepResult:
        """Apply the gradients with learning rate `lr`. All ranks take the same decision. Collective.

        tokens: number of target tokens of the step over all ranks, [] on the device; the host need not have read it. If
        0, the norm is set to NaN and nothing changes.
        """
        shards, masters = self.shards, self.shards.masters
        gradients = shards.gradients()
        placed = [place for place in shards.placements if place.stop > place.start]
        pieces = [(self.specs[place.name], place.of(gradients[place.master])) for place in placed]
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
        self._publish()
        return StepResult(found, True)

    def _publish(self) -> None:
        self.shards.publish()
        if self.float8 is not None:
            self.float8.quantize()

    def keep_in_float8(self, layers: Sequence[SplitLinear], *, transposed: bool) -> None:
        """Keep the weights of `layers` in fp8. transposed: see `KeptWeights`."""
        self.float8 = FreedWeights(self.shards, layers, transposed=transposed)
        self.optimizer.copies = self.shards.copies

    def owned_ranges(self) -> list[OwnedRange]:
        """Views of the masters and optimizer state that this rank updates, one `OwnedRange` per placement."""
        masters = self.shards.masters
        held = [{"param": master.detach()} | self.optimizer.state_of(master) for master in masters]
        return [
            OwnedRange(place.name, place.start, place.stop, {kind: place.of(whole) for kind, whole in state.items()})
            for place in self.shards.placements
            for state in [held[place.master]]
        ]

    @torch.no_grad()
    def refresh(self, optimizer_step: int) -> None:
        """After a write to the owned ranges: copy the masters to the model's parameters on every rank, and set the
        optimizer's step count to `optimizer_step`. Collective."""
        self.optimizer.set_step(optimizer_step)
        write_copies(self.shards.copies)
        self._publish()
