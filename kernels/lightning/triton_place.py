"""Which piece of which sequence a program of the scan works on.

A sequence is a row of the batch, or a document packed into the one row there is. It is cut into segments of `segment`
positions, and a piece is one segment of one sequence: pieces are numbered sequence after sequence, within a sequence in
the order of the scan. Documents' lengths are on the device alone, so for them the host launches as many pieces as
there could be, and those beyond the last do nothing.
"""

import triton
import triton.language as tl


@triton.jit
def sequence(number, total, bounds_pointer, PACKED: tl.constexpr):
    """Its first position in its row and its length."""
    if PACKED:
        start = tl.load(bounds_pointer + number).to(tl.int32)
        return start, tl.load(bounds_pointer + number + 1).to(tl.int32) - start
    else:
        return number * 0, total + number * 0


@triton.jit
def find_piece(
    piece,
    total,
    segments,  # of every row, where rows are not packed
    segment,
    bounds_pointer,  # cu_seqlens
    document_pointer,  # [pieces], the document of each; n for the pieces beyond the last
    first_pointer,  # [n + 1], every document's first piece
    documents,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    CUT: tl.constexpr,  # whether there are segments
):
    """-> sequence, its start, its length, the piece's offset in it and length, and in the order of the scan whether the
    piece is a later one than the first, and whether it is the last. One beyond the last piece of all is neither."""
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
