"""Copying between pieces that were cut differently."""

import math
import random

import pytest
import torch

from megatron_tn.checkpoint.manifest import Piece
from megatron_tn.checkpoint.reshard import overlaps, pieces_of_local_range, rectangles, span_of, view_of
from tests.parallel.test_sharding import SPECS, values


def elements(piece: Piece, whole: torch.Tensor) -> torch.Tensor:
    """What the piece holds, by definition: its box, flattened, cut to its range."""
    return whole[tuple(slice(*edge) for edge in piece.box)].flatten()[piece.start : piece.stop]


def random_piece(shape: tuple[int, ...], draw: random.Random) -> Piece:
    box = []
    for dim, length in enumerate(shape):
        start = draw.randrange(length) if dim < 2 else 0
        stop = draw.randint(start + 1, length) if dim < 2 else length
        box.append((start, stop))
    size = math.prod(stop - start for start, stop in box)
    start = draw.randrange(size)
    return Piece(tuple(box), start, draw.randint(start + 1, size))


@pytest.mark.parametrize("shape", [(1,), (17,), (7, 5), (1, 9), (9, 1), (4, 1, 3)], ids=str)
def test_rectangles_hold_a_piece_exactly(shape):
    whole, draw = torch.arange(math.prod(shape)).view(shape), random.Random(0)
    for _ in range(200):
        piece = random_piece(shape, draw)
        matrix = whole.reshape(shape[0], -1)
        found = torch.cat([matrix[r.top : r.bottom, r.left : r.right].flatten() for r in rectangles(piece)])
        assert found.tolist() == elements(piece, whole).tolist()


@pytest.mark.parametrize("shape", [(17,), (7, 5), (4, 1, 3)], ids=str)
def test_overlaps_copy_what_two_pieces_share_and_nothing_else(shape):
    whole, draw = torch.arange(1, 1 + math.prod(shape)).float().view(shape), random.Random(1)
    for _ in range(300):
        stored, wanted = random_piece(shape, draw), random_piece(shape, draw)
        source, target = elements(stored, whole).clone(), torch.zeros(wanted.stop - wanted.start)
        for rectangle in overlaps(stored, wanted):
            first, last = span_of(stored, rectangle)
            view_of(wanted, target, rectangle).copy_(view_of(stored, source[first:last].clone(), rectangle, first))
        expected = elements(wanted, whole)
        shared = torch.isin(expected, source)
        assert target.tolist() == (expected * shared).tolist()


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_pieces_of_a_local_range_are_its_elements_without_padding(spec, size):
    whole = values(spec)
    for rank in range(size):
        local = spec.take(whole, rank, size).flatten()
        for start, stop in [(0, len(local)), (1, len(local)), (0, len(local) // 2), (len(local) // 3, len(local) - 1)]:
            found = torch.zeros(max(stop - start, 0))
            for piece, at in pieces_of_local_range(spec, rank, size, start, stop):
                found[at : at + piece.stop - piece.start] = elements(piece, whole)
            assert found.tolist() == local[start:stop].tolist()
