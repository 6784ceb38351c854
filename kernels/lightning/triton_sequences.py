"""Maps a scan program to its sequence and piece (sequences.py explains pieces).

Pieces are numbered sequence after sequence, and within a sequence in the order of the scan, which a reverse scan
reverses. The lengths of packed documents are known only on the GPU: the host launches the maximal number of pieces, and
empty pieces do nothing.
"""

import triton
import triton.language as tl


@triton.jit
def sequence(number, total, bounds_pointer, PACKED: tl.constexpr):
    """-> the first position of sequence `number` in its row, and its length."""
    if PACKED:
        start = tl.load(bounds_pointer + number).to(tl.int32)
        return start, tl.load(bounds_pointer + number + 1).to(tl.int32) - start
    else:
        return number * 0, total + number * 0


@triton.jit
def find_piece(
    piece,
    total,
    segments,  # segments of a row, where rows are not packed
    segment,  # positions of a segment
    bounds_pointer,  # [documents + 1]: cu_seqlens, where PACKED
    document_pointer,  # [pieces]: the document of each piece; `documents` for pieces beyond the last
    first_pointer,  # [documents + 1]: every document's first piece
    documents,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    CUT: tl.constexpr,  # whether any sequence has more than one piece
):
    """-> sequence, its first position, its length; the piece's offset in the sequence, the piece's length; whether the
    piece is not the sequence's first, whether it is its last, in the order of the scan. An empty piece has length 0,
    and both are False."""
    if CUT:
        if PACKED:
            number = tl.minimum(tl.load(document_pointer + piece), documents - 1)
            first = tl.load(first_pointer + number)
            parts = tl.load(first_pointer + number + 1) - first
            part = piece - first
        else:
            number = piece // segments
            parts = segments + number * 0
            part = piece % segments
    else:
        number = piece
        part = piece * 0
        parts = part + 1
    start, length = sequence(number, total, bounds_pointer, PACKED)
    if REVERSE:
        offset = (parts - 1 - part) * segment
    else:
        offset = part * segment
    held = tl.minimum(length - offset, segment)
    held = tl.where(part < parts, tl.maximum(held, 0), 0)
    later = (part > 0) & (part < parts)
    return number, start, length, offset, held, later, part == parts - 1
