"""How the sequences of a call are cut into segments, so that a long sequence occupies the whole GPU.

A sequence is a row of the batch, or a document packed into the only row. It is cut into segments of equal length (the
last may be shorter). A piece is one segment of one sequence; one Triton program scans one head of one piece. The
initial states of the pieces are computed first (triton_segments.py).
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.dispatch import capability_of
from kernels.lightning.tiles import Tile, padded, tile_for

# Overhead of a segment, in scanned positions, fitted to measured times: program start, and the pass over two of the
# scan's four tensors that computes the segment's state.
_COST_OF_START = 256
_COST_OF_STATES = 0.4
_SHORTEST_SEGMENT = 1024
_GRAIN = 128  # a multiple of every tile's chunk
FEW = 4096  # positions of `few_positions`
MOST_ROWS = 32


@functools.cache
def segment_length(tile: Tile, programs: int, length: int) -> int:
    """Positions per segment for sequences of `length` positions, scanned by `programs` programs if uncut. Returns
    `length` for no cut.

    Minimises the estimated time: waves of `tile.programs` programs, plus the pass for the segments' states.
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
    """Positions per segment for `rows` rows of `total` positions, q of width `key` and v of width `value`.

    All scans of a call, forward and backward, use the same length. capability: major compute capability.
    """
    tile = tile_for(capability, element_bytes, padded(key), padded(value))
    return segment_length(tile, rows * heads * -(-value // tile.out), total)


def few_positions(rows: int, total: int, **sizes: int) -> tuple[int, int]:
    """(rows, positions of a row), about FEW positions in all, for which Triton compiles the same kernels as for `rows`
    rows of `total` positions: cut or not as those are, and with the same `total` % _GRAIN. sizes: of `plan_segment`."""
    if rows * total <= FEW + _GRAIN:
        return rows, total
    cut = _is_cut(rows, total, **sizes)
    for fewer in (min(rows, MOST_ROWS), min(rows, 2), 1):
        length = min(total, max(FEW // fewer // _GRAIN, 1) * _GRAIN + total % _GRAIN)
        if _is_cut(fewer, length, **sizes) == cut:
            break
    return fewer, length


def _is_cut(rows: int, total: int, **sizes: int) -> bool:
    return plan_segment(rows=rows, total=total, **sizes) < total


def piece_count(total: int, segment: int, *, rows: int, documents: int | None) -> int:
    """Pieces of `rows` rows, or the maximum for any `documents` documents with `total` positions in all."""
    return rows * -(-total // segment) if documents is None else total // segment + documents


@dataclass(frozen=True)
class Sequences:
    """The rows or packed documents of a call and their pieces.

    count: rows, or documents.
    total: positions of a row.
    segment: positions of a segment.
    segments: segments of a row; for packed documents 1 where nothing is cut and more than 1 otherwise.
    pieces: programs per head and slice; for packed documents the last ones may be empty.
    bounds: cu_seqlens [documents + 1], contiguous; None for rows.
    document: [pieces] int32, the document of each piece, `count` for empty pieces; None unless cut.
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
        """The sequences of q [B, T, H, K] and v [B, T, H, V]. states_alone: set `document` and `first` even where no
        document is cut, for the kernels of triton_segments.py."""
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
        bounds = cu_seqlens.contiguous()  # the kernels assume stride 1
        documents = bounds.shape[0] - 1
        if segments == 1 and not states_alone:
            return cls(documents, total, total, 1, documents, bounds)
        # Document lengths are on the GPU, and reading them would synchronise the host: take the maximum of pieces.
        pieces = piece_count(total, segment, rows=1, documents=documents)
        parts = ((bounds.diff() + (segment - 1)) // segment).clamp_(min=1)
        first = torch.nn.functional.pad(parts.cumsum(0, dtype=torch.int32), (1, 0))
        index = torch.arange(pieces, dtype=torch.int32, device=bounds.device)
        document = torch.searchsorted(first[1:], index, right=True, out_int32=True)
        return cls(documents, total, segment, max(segments, 2), pieces, bounds, document, first)
