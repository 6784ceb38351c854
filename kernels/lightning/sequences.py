"""How the sequences of a call are cut into segments, so that a long sequence occupies the whole GPU.

A sequence is a row of the batch, or a document packed into the one row there is. It is cut into segments of equal
length (the last may be shorter). A piece is one segment of one sequence, and one Triton program scans one head of one
piece. The state that a piece starts from is found beforehand (triton_segments.py).
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.lightning.tiles import Tile, capability_of, padded, tile_for

# The cost of a segment beyond its own scan, in positions of a scan, fitted to measured times: starting a program, and
# the pass over two tensors (of the scan's four) for the state at its end.
_COST_OF_START = 256
_COST_OF_STATES = 0.4
_SHORTEST_SEGMENT = 1024
_GRAIN = 128  # a multiple of every tile's chunk


@functools.cache
def segment_length(tile: Tile, programs: int, length: int) -> int:
    """Positions of a segment for sequences of `length`, of which uncut `programs` programs scan; `length`: no cut.

    The length of least estimated time: rounds of `tile.programs` programs at once, and the pass for segments' states.
    """
    best, least = length, float(-(-programs // tile.programs) * (length + _COST_OF_START))
    for segments in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64):
        segment = -(-length // (segments * _GRAIN)) * _GRAIN
        rounds = -(-programs * segments // tile.programs)
        state_rounds = max(1.0, 0.5 * programs * (segments - 1) / tile.programs)
        cost = rounds * (segment + _COST_OF_START) + _COST_OF_STATES * segment * state_rounds
        if segment >= _SHORTEST_SEGMENT and cost < least:
            best, least = segment, cost
    return best


def plan_segment(
    *, capability: int, element_bytes: int, rows: int, total: int, heads: int, key: int, value: int
) -> int:
    """Positions of a segment for `rows` rows of `total` positions, q of width `key` and v of width `value`.

    All scans of a call, forward and backward, use the same. capability: the major compute capability.
    """
    tile = tile_for(capability, element_bytes, padded(key), padded(value))
    return segment_length(tile, rows * heads * -(-value // tile.out), total)


def piece_count(total: int, segment: int, *, rows: int, documents: int | None) -> int:
    """Pieces of `rows` rows, or the most that any `documents` documents of `total` positions together could have."""
    return rows * -(-total // segment) if documents is None else total // segment + documents


@dataclass(frozen=True)
class Sequences:
    """The rows or packed documents of a call and their pieces.

    count: rows, or documents.
    total: positions of a row.
    segment: positions of a segment.
    segments: segments of a row; for packed documents 1 where nothing is cut and more than 1 otherwise.
    pieces: programs a head and slice; for packed documents the last ones may have nothing to do.
    bounds: cu_seqlens [documents + 1], contiguous; None for rows.
    document: [pieces] int32, the document of each piece, `count` for pieces that do not exist; None unless cut.
    first: [documents + 1] int32, the first piece of each document; None unless cut.
    """

    count: int
    total: int
    segment: int
    segments: int
    pieces: int
    bounds: Tensor | None
    document: Tensor | None = None
    first: Tensor | None = None

    @property
    def cut(self) -> bool:
        return self.segments > 1

    @property
    def packed(self) -> bool:
        return self.bounds is not None

    @classmethod
    def of(cls, q: Tensor, v: Tensor, cu_seqlens: Tensor | None, *, states_alone: bool = False) -> "Sequences":
        """Of q [B, T, H, K] and v [B, T, H, V]. states_alone: documents are numbered even where none is cut, as the
        kernels of triton_segments.py need."""
        batch, total, heads, width = q.shape
        segment = plan_segment(
            capability=capability_of(q),
            element_bytes=q.element_size(),
            rows=batch,
            total=total,
            heads=heads,
            key=width,
            value=v.shape[-1],
        )
        segments = -(-total // segment)
        if cu_seqlens is None:
            return cls(batch, total, segment, segments, piece_count(total, segment, rows=batch, documents=None), None)
        bounds = cu_seqlens.contiguous()  # the kernels read it by consecutive addresses
        documents = bounds.shape[0] - 1
        if segments == 1 and not states_alone:
            return cls(documents, total, total, 1, documents, bounds)
        # The documents' lengths are on the GPU, where reading them would stop the host: count the most there can be.
        pieces = piece_count(total, segment, rows=1, documents=documents)
        parts = ((bounds.diff() + (segment - 1)) // segment).clamp_(min=1)
        first = torch.nn.functional.pad(parts.cumsum(0, dtype=torch.int32), (1, 0))
        index = torch.arange(pieces, dtype=torch.int32, device=bounds.device)
        document = torch.searchsorted(first[1:], index, right=True, out_int32=True)
        return cls(documents, total, segment, max(segments, 2), pieces, bounds, document, first)
