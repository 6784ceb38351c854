"""Which part of a logical parameter each tensor-parallel rank holds.

A logical parameter is the whole tensor, as in released files. Its `ShardSpec` gives the split dimension and the number
of blocks, each split separately: the fused q|k|v|u projection has four blocks, so rank r holds the r-th part of q, of
k, of v and of u, concatenated. Initialisation, checkpoints, resharding, export, whole gradients and the gradient norm
use these specs.
"""

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
    dim: the dimension split over tensor-parallel ranks; None for a replicated parameter.
    blocks: number of equal blocks along `dim`, each split over the ranks.
    heads: number of heads along each block of a projection to heads, equal in rows; 1: the rows are no heads'.
    padded: length of `dim` after padding (the vocabulary); 0 means no padding.

    Where a block's length is not a multiple of the number of ranks, its parts differ in length by at most one.
    """

    shape: tuple[int, ...]
    dim: int | None = None
    blocks: int = 1
    padded: int = 0
    heads: int = 1

    @property
    def replicated(self) -> bool:
        return self.dim is None

    def _parts(self, rank: int, size: int) -> list[tuple[int, int]]:
        """For each block, [start, stop) of the rank's part along the padded `dim`."""
        block = (self.padded or self.shape[self.dim]) // self.blocks
        start, stop = block * rank // size, block * (rank + 1) // size
        return [(index * block + start, index * block + stop) for index in range(self.blocks)]

    def local_shape(self, rank: int, size: int) -> tuple[int, ...]:
        """Shape of a rank's local tensor, padding included."""
        if self.dim is None:
            return self.shape
        shape = list(self.shape)
        shape[self.dim] = sum(stop - start for start, stop in self._parts(rank, size))
        return tuple(shape)

    def boxes(self, rank: int, size: int) -> list[Box]:
        """The boxes of the logical tensor that rank `rank` of `size` holds, one per block, in the local tensor's order.

        Boxes exclude padding, so a box may be shorter than its rows of the local tensor, or empty.
        """
        whole = [(0, length) for length in self.shape]
        if self.dim is None:
            return [tuple(whole)]
        length = self.shape[self.dim]
        edges = [(min(start, length), min(stop, length)) for start, stop in self._parts(rank, size)]
        return [(*whole[: self.dim], edge, *whole[self.dim + 1 :]) for edge in edges]

    def local_rows(self, rank: int, size: int) -> list[tuple[int, int]]:
        """For each of `boxes`, the rows [start, stop) of the local tensor that hold it, padding included."""
        if self.dim != 0:
            return [(0, self.shape[0])]
        edges, at = [], 0
        for start, stop in self._parts(rank, size):
            edges.append((at, at + stop - start))
            at += stop - start
        return edges

    def take(self, logical: Tensor, rank: int, size: int) -> Tensor:
        """Rank `rank`'s local tensor, copied from `logical`, with zeros as padding."""
        if self.dim is None:
            return logical.clone()
        parts = [logical[tuple(slice(*edge) for edge in box)] for box in self.boxes(rank, size)]
        local = torch.cat(parts, dim=self.dim)
        return _extended(local, self.dim, self.local_shape(rank, size)[self.dim] - local.shape[self.dim])

    def gather(self, local: Tensor, axis: Axis) -> Tensor:
        """The logical tensor, without padding, on every rank, from all ranks' `local`. Collective over `axis`."""
        if self.dim is None or (axis.size == 1 and not self.padded):
            return local.clone()
        dim = self.dim
        # all_gather needs equal lengths: shorter parts are padded before, and the padding is cut off after.
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
    """x followed by `by` zeros along `dim`."""
    if by == 0:
        return x
    shape = list(x.shape)
    shape[dim] = by
    return torch.cat([x, x.new_zeros(shape)], dim=dim)


def mark(parameter: torch.nn.Parameter, spec: ShardSpec) -> torch.nn.Parameter:
    """Attach `spec` to the parameter and, if it is split, DeepSpeed's tensor-parallel attributes: DeepSpeed's gradient
    norm counts parameters without them once, not per rank."""
    parameter.shard_spec = spec
    parameter.model_parallel = parameter.tensor_model_parallel = not spec.replicated
    return parameter


@dataclass
class OwnedRange:
    """Consecutive elements of one parameter whose fp32 master and optimizer state this rank holds.

    name: released name of the parameter.
    start, stop: element range of the flattened local (tensor-parallel) parameter.
    values: "param" (the master), and the state kinds that the optimizer keeps of this parameter, such as "exp_avg" ->
        fp32 [stop - start], views of the optimizer's tensors.
    """

    name: str
    start: int
    stop: int
    values: dict[str, Tensor]
