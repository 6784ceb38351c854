"""Which part of a logical parameter each tensor-parallel rank holds.

A logical parameter is the tensor of the released layout, whole. `ShardSpec` says along which dimension it is split and
into how many blocks that are each split on their own: the fused q|k|v|u projection has four blocks, so rank r holds
the r-th slice of q, of k, of v and of u, stacked. Everything that must know about splits asks this one map:
initialisation, checkpoints, resharding, export, gradient collection and gradient-norm counting.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tn.parallel.collectives import all_gather
from megatron_tn.parallel.context import Axis

Box = tuple[tuple[int, int], ...]  # [start, stop) along each dimension of a logical tensor


@dataclass(frozen=True)
class ShardSpec:
    """Split of one logical parameter.

    shape: of the logical tensor, without padding.
    dim: the dimension that is split over tensor parallel, or None for a parameter every rank holds whole.
    blocks: equal parts along `dim` that are split one by one.
    padded: length of `dim` after padding (the vocabulary); 0 means no padding.
    """

    shape: tuple[int, ...]
    dim: int | None = None
    blocks: int = 1
    padded: int = 0

    @property
    def replicated(self) -> bool:
        return self.dim is None

    def local_shape(self, tp: int) -> tuple[int, ...]:
        """Shape of one rank's part, padding included."""
        if self.dim is None:
            return self.shape
        shape = list(self.shape)
        shape[self.dim] = (self.padded or shape[self.dim]) // tp
        return tuple(shape)

    def boxes(self, rank: int, size: int) -> list[Box]:
        """Boxes of the logical tensor that rank `rank` of `size` holds, in the order in which they are stacked.

        Rows that are padding belong to no box, so a box may be shorter than its part of the local tensor, or empty.
        """
        whole = [(0, length) for length in self.shape]
        if self.dim is None:
            return [tuple(whole)]
        length = self.shape[self.dim]
        block = (self.padded or length) // self.blocks
        part = block // size
        found = []
        for index in range(self.blocks):
            start = min(index * block + rank * part, length)
            stop = min(start + part, length)
            box = list(whole)
            box[self.dim] = (start, stop)
            found.append(tuple(box))
        return found

    def take(self, logical: Tensor, rank: int, size: int) -> Tensor:
        """Rank `rank`'s part of the whole tensor, padding rows zero. A new tensor."""
        if self.dim is None:
            return logical.clone()
        local = logical.new_zeros(self.local_shape(size))
        offset = 0
        for box in self.boxes(rank, size):
            start, stop = box[self.dim]
            local.narrow(self.dim, offset, stop - start).copy_(logical.narrow(self.dim, start, stop - start))
            offset += local.shape[self.dim] // self.blocks
        return local

    def gather(self, local: Tensor, axis: Axis) -> Tensor:
        """The whole tensor from every rank's part, on every rank, padding removed. Collective over `axis`."""
        if self.dim is None or (axis.size == 1 and not self.padded):
            return local.clone()
        # [rank, block, ...] -> [block, rank, ...] along the split dimension.
        parts = all_gather(local.unsqueeze(0), axis)
        parts = parts.unflatten(self.dim + 1, (self.blocks, -1)).movedim(0, self.dim + 1)
        whole = parts.flatten(self.dim, self.dim + 2)
        return whole.narrow(self.dim, 0, self.shape[self.dim]).contiguous()


def mark(parameter: torch.nn.Parameter, spec: ShardSpec) -> torch.nn.Parameter:
    """Attach the split to a parameter, and tell DeepSpeed's gradient norm which parameters every tp rank repeats."""
    parameter.shard_spec = spec
    parameter.model_parallel = parameter.tensor_model_parallel = not spec.replicated
    return parameter


@dataclass
class OwnedRange:
    """A contiguous run of elements of one parameter whose fp32 master and moments this rank owns.

    name: released name of the parameter.
    start, stop: element range of the flattened local (tensor-parallel) parameter.
    values: "param", "exp_avg", "exp_avg_sq" -> fp32 [stop - start]. Views: what is written here reaches the optimizer.
    """

    name: str
    start: int
    stop: int
    values: dict[str, Tensor]
