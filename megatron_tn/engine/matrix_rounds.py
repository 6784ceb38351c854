"""Brings parts of matrices together and the results back, for an optimizer that needs whole matrices (Muon).

In a round every rank gets its matrices by one all-to-all, and returns the results by another. A rank's matrices of a
round have one shape, so that they are one batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tn.engine.matrices import Matrix, batches, matrices_of, shared_out
from megatron_tn.engine.shards import Placement, Shards
from megatron_tn.optim.groups import is_block_matrix
from megatron_tn.optim.muon import MatrixPart
from megatron_tn.parallel.context import Axis
from megatron_tn.parallel.sharding import ShardSpec


class Piece(NamedTuple):
    """`length` elements of a matrix, from `offset` on in the concatenation of its flattened parts. They lie in
    masters[master], flattened, from `start` on."""

    matrix: Matrix
    offset: int
    length: int
    master: int
    start: int


def pieces_of(matrix: Matrix, placements: Sequence[Placement], tp_rank: int) -> list[Piece]:
    """The parts of `matrix` among a rank's placements of its parameter."""
    size, before = matrix.sizes[tp_rank], sum(matrix.sizes[:tp_rank])
    first, found = matrix.starts[tp_rank], []
    for place in placements:
        start, stop = max(place.start, first), min(place.stop, first + size)
        if start < stop:
            at = place.offset + start - place.start
            found.append(Piece(matrix, before + start - first, stop - start, place.master, at))
    return found


def matrix_rounds(shards: Shards, specs: Mapping[str, ShardSpec], tp: Axis, *, heads_apart: bool) -> list[Round]:
    """The rounds in which all matrices that Muon updates are updated. Collective.

    specs: parameter name -> its split over tensor parallelism, in the same order on every rank. heads_apart: see
    `matrices_of`. Every rank knows which rank updates which matrix, and tells it which pieces of it to expect.
    """
    axis = _ranks(tp, shards.sharded_over)
    named = [(name, spec) for name, spec in specs.items() if is_block_matrix(name, len(spec.shape))]
    by_name: dict[str, list[Placement]] = {name: [] for name, _ in named}
    for place in shards.placements:
        if place.name in by_name:
            by_name[place.name].append(place)
    matrices = [m for name, spec in named for m in matrices_of(name, spec, tp.size, heads_apart=heads_apart)]
    shares = shared_out(matrices, axis.size)
    sent = [[pieces_of(matrix, by_name[matrix.name], tp.rank) for matrix in share] for share in shares]
    received = _told(sent, axis, shards.masters[0].device)
    of_ranks = [_rounds(share) for share in shares]
    found = []
    for number in range(max(map(len, of_ranks))):
        of_round = [rounds[number] if number < len(rounds) else slice(0, 0) for rounds in of_ranks]
        mine = of_round[axis.rank]
        found.append(
            Round(
                shares[axis.rank][mine],
                [list(itertools.chain(*pieces[rows])) for pieces, rows in zip(sent, of_round, strict=True)],
                [[(row - mine.start, *at) for row, *at in rows if mine.start <= row < mine.stop] for rows in received],
                shards.masters,
                axis,
            )
        )
    return found


def _rounds(share: Sequence[Matrix]) -> list[slice]:
    """For each round of a rank, the slice of its matrices `share` that the round updates."""
    edges = itertools.accumulate(map(len, batches(share)), initial=0)
    return [slice(*pair) for pair in itertools.pairwise(edges)]


def _told(sent: Sequence[Sequence[Sequence[Piece]]], axis: Axis, device: torch.device) -> list[list[list[int]]]:
    """Exchange what the ranks send each other. sent[n]: this rank's pieces of each matrix that rank n updates. Returns
    for every rank its pieces of the matrices that this rank updates: [index of the matrix, offset, length] each.
    Collective."""
    rows = [
        [[index, piece.offset, piece.length] for index, pieces in enumerate(share) for piece in pieces]
        for share in sent
    ]
    if axis.size == 1:
        return rows
    counts = torch.tensor([len(part) for part in rows], device=device)
    theirs = torch.zeros_like(counts)
    dist.all_to_all_single(theirs, counts, group=axis.group)
    table = torch.tensor(list(itertools.chain(*rows)), dtype=torch.int64, device=device).view(-1, 3)
    received = table.new_empty(sum(theirs.tolist()), 3)
    dist.all_to_all_single(received, table, theirs.tolist(), counts.tolist(), group=axis.group)
    return [part.tolist() for part in received.split(theirs.tolist())]


def _ranks(tp: Axis, sharded_over: Axis) -> Axis:
    """The ranks that hold different parts of the matrices."""
    if sharded_over.size == 1:
        return tp
    if tp.size == 1:
        return sharded_over
    return Axis(dist.group.WORLD, dist.get_rank(), dist.get_world_size())


class Round:
    """See `optim.muon.MatrixRound`.

    mine: the matrices that this rank updates, of one shape. sent: of each rank, this rank's pieces of the matrices that
    it updates. received: of each rank, its pieces of `mine`: (row of the matrix, offset, length) each.
    """

    def __init__(
        self,
        mine: Sequence[Matrix],
        sent: Sequence[Sequence[Piece]],
        received: Sequence[Sequence[tuple[int, int, int]]],
        masters: Sequence[Tensor],
        axis: Axis,
    ):
        self.axis = axis
        self.device = masters[0].device
        self.mine = mine
        self.sent = [sum(piece.length for piece in part) for part in sent]
        self.received = [sum(length for _, _, length in part) for part in received]
        self.parts = [
            MatrixPart(masters[piece.master], piece.start, piece.start + piece.length, piece.matrix.shape)
            for part in sent
            for piece in part
        ]
        self.places = [(row, start, start + length) for part in received for row, start, length in part]

    def send_buffer(self, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        if self.axis.size == 1:
            return self._empty(dtype)
        buffer = torch.empty(sum(self.sent), dtype=dtype, device=self.device)
        return buffer, list(buffer.split([part.stop - part.start for part in self.parts]))

    def _empty(self, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """This rank's matrices, flat, uninitialised, and the place of each received piece in them."""
        rows, columns = self.mine[0].shape if self.mine else (0, 0)
        flat = torch.empty(len(self.mine), rows * columns, dtype=dtype, device=self.device)
        return flat, [flat[row, start:stop] for row, start, stop in self.places]

    def gather(self, buffer: Tensor) -> Tensor:
        flat = buffer
        if self.axis.size > 1:
            flat, places = self._empty(buffer.dtype)
            received = self._exchange(buffer, self.received, self.sent)
            _copy(places, received.split([len(place) for place in places]))
        rows, columns = self.mine[0].shape if self.mine else (0, 0)
        matrices = flat.view(len(self.mine), rows, columns)
        for matrix, whole in zip(self.mine, matrices, strict=True):
            if matrix.dim == 1 and len(matrix.sizes) > 1:
                parts = whole.view(-1).split(matrix.sizes)
                whole.copy_(torch.cat([part.view(rows, -1) for part in parts], dim=1))
        return matrices

    def scatter(self, matrices: Tensor) -> list[Tensor]:
        flat = []
        for matrix, whole in zip(self.mine, matrices, strict=True):
            if matrix.dim == 1 and len(matrix.sizes) > 1:
                widths = [size // matrix.shape[0] for size in matrix.sizes]
                whole = torch.cat([part.reshape(-1) for part in whole.split(widths, dim=1)])
            flat.append(whole.reshape(-1))
        values = [flat[row][start:stop] for row, start, stop in self.places]
        if self.axis.size == 1:
            return values
        packed = torch.empty(sum(self.received), dtype=matrices.dtype, device=self.device)
        _copy(packed.split([len(value) for value in values]), values)
        lengths = [part.stop - part.start for part in self.parts]
        return list(self._exchange(packed, self.sent, self.received).split(lengths))

    def _exchange(self, packed: Tensor, received: list[int], sent: list[int]) -> Tensor:
        """All-to-all: sent[n] elements of `packed` go to rank n; received[n] come from it."""
        found = packed.new_empty(sum(received))
        dist.all_to_all_single(found, packed, received, sent, group=self.axis.group)
        return found


def _copy(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(list(targets), list(values))
