"""Initial states of the segments of a long sequence, so that the segments can be scanned in parallel.

piece_states_kernel computes every piece's state from zero, which reads two of the scan's inputs a second time;
combine_kernel loops over a sequence's pieces: state <- exp(-r length) state + the piece's state. The state after the
last piece is the sequence's final state. States that are not the initial state of a piece are neither written nor read:
for many short documents of one piece each, states have more elements than inputs.
"""

import triton
import triton.language as tl

from kernels.lightning.triton_scan import load_tile
from kernels.lightning.triton_sequences import find_piece, sequence


@triton.jit
def piece_states_kernel(
    b,  # [B, T, H, summed width]; b and c: TMA descriptors, or pointers
    c,  # [B, T, H, c's width]
    states_pointer,  # [pieces, heads, summed width, c's width], fp32, written
    decay_pointer,  # [heads], fp32
    bounds_pointer,  # see find_piece
    document_pointer,
    first_pointer,
    total,
    heads,
    segments,
    segment,  # positions per segment, a multiple of CHUNK
    sequences,
    slices,
    summed_width,
    c_width,
    b_row,  # strides in elements: from row to row, from position to position, from head to head
    b_time,
    b_head,
    c_row,
    c_time,
    c_head,
    state_summed,  # strides within [summed width, c's width]
    state_c,
    REVERSE: tl.constexpr,
    RAGGED: tl.constexpr,  # whether a chunk may be partial
    PACKED: tl.constexpr,
    CUT: tl.constexpr,
    WITH_LAST: tl.constexpr,  # whether the last pieces' states are wanted (for the final states)
    DESCRIPTORS: tl.constexpr,
    CHUNK: tl.constexpr,
    SUMMED: tl.constexpr,
    OUT: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    column = (program % slices) * OUT
    piece_head = program // slices
    head = piece_head % heads
    number, start, _, offset, held_length, _, is_last = find_piece(
        piece_head // heads, total, segments, segment, bounds_pointer, document_pointer, first_pointer, sequences,
        REVERSE, PACKED, CUT
    )  # fmt: skip
    if PACKED:
        row = number * 0
    else:
        row = number
    if not DESCRIPTORS:
        b += row.to(tl.int64) * b_row + head.to(tl.int64) * b_head
        c += row.to(tl.int64) * c_row + head.to(tl.int64) * c_head

    dtype: tl.constexpr = b.dtype if DESCRIPTORS else b.dtype.element_ty
    rate = tl.load(decay_pointer + head)
    i = tl.arange(0, CHUNK)
    columns = column + tl.arange(0, OUT)
    summed = tl.arange(0, SUMMED)

    # exp(-104) is 0 in fp32, even with denormals: chunks with r * (distance to the piece's end) >= 104 are skipped.
    chunks = tl.cdiv(held_length, CHUNK)
    reach = tl.minimum(104.0 / tl.maximum(rate, 1e-6), 1e8).to(tl.int32)
    skipped = tl.maximum(chunks - 2 - reach // CHUNK, 0)
    if not WITH_LAST:
        skipped = tl.where(is_last, chunks, skipped)

    # Two loops, as in scan_kernel: over full chunks without masks, and over the partial one.
    state = tl.zeros([OUT, SUMMED], dtype=tl.float32)
    split = held_length // CHUNK
    if REVERSE:
        split = chunks - split
    PARTIAL: tl.constexpr = 0 if REVERSE else 1
    WHOLE: tl.constexpr = 1 - PARTIAL
    for part in tl.static_range(0 if RAGGED else WHOLE, 2 if RAGGED else WHOLE + 1):
        rows = held_length % CHUNK if part == PARTIAL else CHUNK
        write_fade = tl.exp(-rate * (i + 1 if REVERSE else tl.maximum(rows - 1 - i, 0)))
        across = tl.exp(-rate * rows)
        first = skipped if part == 0 else tl.maximum(skipped, split)
        for step in tl.range(first, split if part == 0 else chunks, num_stages=STAGES):
            if REVERSE:
                begin = (chunks - 1 - step) * CHUNK
            else:
                begin = step * CHUNK
            position = start + offset + begin
            held = begin + i < held_length
            b_tile = load_tile(b, row, head, position, 0, b_time, summed_width, held, CHUNK, SUMMED, DESCRIPTORS)
            c_t = load_tile(c, row, head, position, column, c_time, c_width, held, CHUNK, OUT, DESCRIPTORS).trans()
            if PACKED and part == PARTIAL:  # a TMA tile extends into the next document
                b_tile = tl.where(held[:, None], b_tile, 0.0)
                c_t = tl.where(held[None, :], c_t, 0.0)
            faded = (c_t * write_fade[None, :]).to(dtype)
            state = tl.dot(faded, b_tile, state * across, input_precision="ieee")

    at = columns[:, None] * state_c + summed[None, :] * state_summed
    mask = (columns[:, None] < c_width) & (summed[None, :] < summed_width)
    own = states_pointer + piece_head.to(tl.int64) * (summed_width * c_width)
    if WITH_LAST:
        tl.store(own + at, state, mask=mask)
    else:
        tl.store(own + at, state, mask=mask & (is_last == 0))


@triton.jit
def combine_kernel(
    states_pointer,  # [pieces, heads, size], fp32: every piece's state from zero, replaced by its initial state
    given_pointer,  # [sequences, heads, size], fp32: the sequences' initial states; None for zero
    last_pointer,  # [sequences, heads, size], fp32, written: the state after each sequence; None where not wanted
    decay_pointer,  # [heads], fp32
    bounds_pointer,  # see find_piece
    first_pointer,
    total,
    heads,
    segments,
    segment,  # positions per segment
    size,  # elements of a state
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per sequence, head and BLOCK elements of the state; loops over pieces in the order of the scan."""
    number = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    rate = tl.load(decay_pointer + head)
    _, length = sequence(number, total, bounds_pointer, PACKED)
    if PACKED:
        first = tl.load(first_pointer + number)
        parts = tl.load(first_pointer + number + 1) - first
    else:
        first = number * segments
        parts = segments + number * 0
    end = (number * heads + head).to(tl.int64) * size + at
    state = tl.zeros([BLOCK], dtype=tl.float32)
    if given_pointer is not None:
        state = tl.load(given_pointer + end, mask=mask, other=0.0)
    for part in range(parts):
        if REVERSE:
            rows = tl.minimum(length - (parts - 1 - part) * segment, segment)
        else:
            rows = tl.minimum(length - part * segment, segment)
        pointer = states_pointer + ((first + part) * heads + head).to(tl.int64) * size + at
        if last_pointer is None:
            own = tl.load(pointer, mask=mask & (part < parts - 1), other=0.0)
        else:
            own = tl.load(pointer, mask=mask, other=0.0)
        if given_pointer is None:
            tl.store(pointer, state, mask=mask & (part > 0))
        else:
            tl.store(pointer, state, mask=mask)
        state = state * tl.exp(-rate * rows.to(tl.float32)) + own
    if last_pointer is not None:
        tl.store(last_pointer + end, state, mask=mask)
