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

    A block whose length does not divide is split as evenly as it goes: parts differ by one at most.
    """

    shape: tuple[int, ...]
    dim: int | None = None
    blocks: int = 1
    padded: int = 0

    @property
    def replicated(self) -> bool:
        return self.dim is None

    def _parts(self, rank: int, size: int) -> list[tuple[int, int]]:
        """[start, stop) along `dim` of each block's part that the rank holds, counted with padding."""
        block = (self.padded or self.shape[self.dim]) // self.blocks
        start, stop = block * rank // size, block * (rank + 1) // size
        return [(index * block + start, index * block + stop) for index in range(self.blocks)]

    def local_shape(self, rank: int, size: int) -> tuple[int, ...]:
        """Shape of a rank's part, padding included."""
        if self.dim is None:
            return self.shape
        shape = list(self.shape)
        shape[self.dim] = sum(stop - start for start, stop in self._parts(rank, size))
        return tuple(shape)

    def boxes(self, rank: int, size: int) -> list[Box]:
        """Boxes of the logical tensor that rank `rank` of `size` holds, in the order in which they are stacked.

        Padding belongs to no box, so a box may be shorter than its part of the local tensor, or empty.
        """
        whole = [(0, length) for length in self.shape]
        if self.dim is None:
            return [tuple(whole)]
        length = self.shape[self.dim]
        edges = [(min(start, length), min(stop, length)) for start, stop in self._parts(rank, size)]
        return [(*whole[: self.dim], edge, *whole[self.dim + 1 :]) for edge in edges]

    def local_rows(self, rank: int, size: int) -> list[tuple[int, int]]:
        """For each of `boxes`, the rows [start, stop) of the local tensor where it is laid, padding included."""
        if self.dim != 0:
            return [(0, self.shape[0])]
        edges, at = [], 0
        for start, stop in self._parts(rank, size):
            edges.append((at, at + stop - start))
            at += stop - start
        return edges

    def take(self, logical: Tensor, rank: int, size: int) -> Tensor:
        """Rank `rank`'s part of the whole tensor, padding zero. A new tensor."""
        if self.dim is None:
            return logical.clone()
        parts = [logical[tuple(slice(*edge) for edge in box)] for box in self.boxes(rank, size)]
        local = torch.cat(parts, dim=self.dim)
        return _extended(local, self.dim, self.local_shape(rank, size)[self.dim] - local.shape[self.dim])

    def gather(self, local: Tensor, axis: Axis) -> Tensor:
        """The whole tensor from every rank's part, on every rank, padding removed. Collective over `axis`."""
        if self.dim is None or (axis.size == 1 and not self.padded):
            return local.clone()
        dim = self.dim
        # Parts are made equally long for the collective, and cut back after it.
        longest = max(self.local_shape(rank, axis.size)[dim] for rank in range(axis.size)) // self.blocks
        local = local.unflatten(dim, (self.blocks, -1))
        local = _extended(local, dim + 1, longest - local.shape[dim + 1])
        parts = all_gather(local.unsqueeze(0), axis).unbind(0)
        pieces = [
            parts[rank].select(dim, block).narrow(dim, 0, stop - start)
            for block in range(self.blocks)
            for rank in range(axis.size)
            for start, stop in [self._parts(rank, axis.size)[block]]
        ]
        return torch.cat(pieces, dim=dim).narrow(dim, 0, self.shape[dim]).contiguous()


def _extended(x: Tensor, dim: int, by: int) -> Tensor:
    """x with `by` zeros more along `dim`."""
    if by == 0:
        return x
    shape = list(x.shape)
    shape[dim] = by
    return torch.cat([x, x.new_zeros(shape)], dim=dim)


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
