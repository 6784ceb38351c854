"""Brings parts of matrices together and the results back, for an optimizer that needs whole matrices (Muon).

In a round every rank gets what it lacks of its matrices by one all-to-all, and returns the results by another. A rank's
matrices of a round have one shape, so that they are one batch; what it holds of them itself is written to the batch,
and read from it, in place.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tn.engine.matrices import Held, Matrix, batches, matrices_of, shared_out, stays
from megatron_tn.engine.shards import Placement, Shards
from megatron_tn.optim.groups import is_block_matrix
from megatron_tn.optim.muon import Buffers, MatrixSpan
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
    axis, device = _ranks(tp, shards.sharded_over), shards.masters[0].device
    named = [(name, spec) for name, spec in specs.items() if is_block_matrix(name, len(spec.shape))]
    by_name: dict[str, list[Placement]] = {name: [] for name, _ in named}
    for place in shards.placements:
        if place.name in by_name:
            by_name[place.name].append(place)
    matrices = [m for name, spec in named for m in matrices_of(name, spec, tp.size, heads_apart=heads_apart)]
    pieces = {matrix: pieces_of(matrix, by_name[matrix.name], tp.rank) for matrix in matrices}
    held = _most_held(pieces, axis, device)
    shares = shared_out(matrices, axis.size, held)
    received = _told([[pieces[matrix] for matrix in share] for share in shares], axis, device)
    of_ranks = [batches(share) for share in shares]
    found, first = [], 0
    for of_round in itertools.zip_longest(*of_ranks, fillvalue=()):
        last = first + len(of_round[axis.rank])
        found.append(
            Round(
                of_round[axis.rank],
                [[pieces[matrix] for matrix in part] for part in of_round],
                [[(row - first, *at) for row, *at in rows if first <= row < last] for rows in received],
                shards.masters,
                axis,
                exchanged=not all(stays(m, held[m], rank) for rank, part in enumerate(of_round) for m in part),
            )
        )
        first = last
    return found


def _most_held(pieces: Mapping[Matrix, Sequence[Piece]], axis: Axis, device: torch.device) -> dict[Matrix, Held]:
    """pieces: this rank's of each matrix. Collective."""
    held = [sum(piece.length for piece in parts) for parts in pieces.values()]
    # Elements and rank in one number, whose maximum over ranks is that of the first rank with most elements.
    codes = torch.tensor(held, dtype=torch.int64, device=device) * axis.size + axis.size - 1 - axis.rank
    if axis.size > 1:
        dist.all_reduce(codes, dist.ReduceOp.MAX, group=axis.group)
    found = (divmod(code, axis.size) for code in codes.tolist())
    return {
        matrix: Held(elements, axis.size - 1 - last) for matrix, (elements, last) in zip(pieces, found, strict=True)
    }


def _told(sent: Sequence[Sequence[Sequence[Piece]]], axis: Axis, device: torch.device) -> list[list[list[int]]]:
    """Exchange what the ranks send each other. sent[n]: this rank's pieces of each matrix that rank n updates. Returns
    for every other rank its pieces of the matrices that this rank updates: [index of the matrix, offset, length] each.
    Collective."""
    rows = [
        [[index, piece.offset, piece.length] for index, pieces in enumerate(share) for piece in pieces]
        if rank != axis.rank
        else []
        for rank, share in enumerate(sent)
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


class Run(NamedTuple):
    """`length` elements from `first` on in one flat tensor, and from `second` on in another. key: names the tensors."""

    key: Hashable
    first: int
    second: int
    length: int


def merged(runs: Iterable[Run]) -> list[Run]:
    """Joins runs of one key that follow each other in both tensors."""
    found: list[Run] = []
    for run in runs:
        before = found[-1] if found else None
        if before and run[:3] == (before.key, before.first + before.length, before.second + before.length):
            found[-1] = before._replace(length=before.length + run.length)
        else:
            found.append(run)
    return found


class Round:
    """See `optim.muon.MatrixRound`.

    mine: the matrices that this rank updates, of one shape, those cut along columns last. sent: of each rank, this
    rank's pieces of each matrix that it updates. received: of each other rank, its pieces of `mine`: (row of the
    matrix, offset, length) each. exchanged: whether any rank holds pieces of a matrix that another updates.
    """

    def __init__(
        self,
        mine: Sequence[Matrix],
        sent: Sequence[Sequence[Sequence[Piece]]],
        received: Sequence[Sequence[tuple[int, int, int]]],
        masters: Sequence[Tensor],
        axis: Axis,
        *,
        exchanged: bool,
    ):
        self.axis = axis
        self.exchanged = exchanged
        self.device = masters[0].device
        self.shape = (len(mine), *(mine[0].shape if mine else (0, 0)))
        self.whole = sum(not matrix.cut_along_columns for matrix in mine)
        self.widths = [size // mine[-1].shape[0] for size in mine[-1].sizes] if self.whole < len(mine) else []
        elements = self.shape[1] * self.shape[2]
        kept = [(row * elements, piece) for row, pieces in enumerate(sent[axis.rank]) for piece in pieces]
        given = [
            [piece for pieces in share for piece in pieces] if rank != axis.rank else []
            for rank, share in enumerate(sent)
        ]
        self.sent = [sum(piece.length for piece in part) for part in given]
        self.received = [sum(length for *_, length in part) for part in received]
        # first: position in the master. second: in this rank's matrices, or in what it sends.
        self.kept = merged(
            Run((piece.master, piece.matrix.shape), piece.start, start + piece.offset, piece.length)
            for start, piece in kept
        )
        flat = list(itertools.chain(*given))
        ends = itertools.accumulate((piece.length for piece in flat), initial=0)
        self.given = merged(
            Run((piece.master, piece.matrix.shape), piece.start, at, piece.length)
            for piece, at in zip(flat, ends, strict=False)
        )
        # first: position in what this rank receives. second: in its matrices.
        flat = list(itertools.chain(*received))
        ends = itertools.accumulate((length for *_, length in flat), initial=0)
        self.taken = merged(
            Run(None, at, row * elements + offset, length)
            for (row, offset, length), at in zip(flat, ends, strict=False)
        )
        self.spans = [
            MatrixSpan(masters[master], run.first, run.first + run.length, shape)
            for run in (*self.kept, *self.given)
            for master, shape in [run.key]
        ]

    def buffers(self, dtype: torch.dtype) -> tuple[Buffers, list[Tensor]]:
        matrices = torch.empty(self.shape, dtype=dtype, device=self.device)
        sent = torch.empty(sum(self.sent), dtype=dtype, device=self.device)
        return Buffers(matrices, sent), self._places(matrices.view(-1), sent)

    def _places(self, matrices: Tensor, others: Tensor) -> list[Tensor]:
        """The elements of each span in this rank's matrices, flattened, or among those of other ranks' matrices."""
        kept = [matrices[run.second : run.second + run.length] for run in self.kept]
        return kept + [others[run.second : run.second + run.length] for run in self.given]

    def gather(self, buffers: Buffers) -> Tensor:
        matrices, sent = buffers
        if self.exchanged:
            received = self._exchange(sent, self.received, self.sent)
            _copy(
                [matrices.view(-1)[run.second : run.second + run.length] for run in self.taken],
                [received[run.first : run.first + run.length] for run in self.taken],
            )
        if self.widths:
            cut = matrices[self.whole :]
            parts = cut.flatten(1).split([self.shape[1] * width for width in self.widths], dim=1)
            cut.copy_(torch.cat([part.unflatten(1, (self.shape[1], -1)) for part in parts], dim=2))
        return matrices

    def scatter(self, matrices: Tensor) -> list[Tensor]:
        matrices = matrices.contiguous()
        if self.widths:
            cut = matrices[self.whole :]
            cut.flatten(1).copy_(torch.cat([part.flatten(1) for part in cut.split(self.widths, dim=2)], dim=1))
        flat, others = matrices.view(-1), matrices.new_empty(0)
        if self.exchanged:
            packed = matrices.new_empty(sum(self.received))
            _copy(
                [packed[run.first : run.first + run.length] for run in self.taken],
                [flat[run.second : run.second + run.length] for run in self.taken],
            )
            others = self._exchange(packed, self.sent, self.received)
        return self._places(flat, others)

    def _exchange(self, packed: Tensor, received: list[int], sent: list[int]) -> Tensor:
        """All-to-all: sent[n] elements of `packed` go to rank n; received[n] come from it."""
        found = packed.new_empty(sum(received))
        dist.all_to_all_single(found, packed, received, sent, group=self.axis.group)
        return found


def _copy(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(list(targets), list(values))
