"""The states that segments of a long sequence start from, so that one head's segments can be scanned side by side.

First every segment's own state, as if it started from nothing (the only extra reading of two inputs that splitting
costs), then a walk over the segments that fades and adds them up.
"""

import triton
import triton.language as tl

from kernels.lightning.triton_scan import load_tile


@triton.jit
def segment_states_kernel(
    b,  # [B, T, H, summed width], a descriptor or a pointer, as is c
    c,  # [B, T, H, c's width]
    states_pointer,  # [B, heads, segments, summed width, c's width], fp32: segment s writes what s + 1 starts from
    decay_pointer,  # [heads], fp32
    total,
    heads,
    segments,
    segment,  # positions a segment, a multiple of CHUNK
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
    DESCRIPTORS: tl.constexpr,
    CHUNK: tl.constexpr,
    SUMMED: tl.constexpr,
    OUT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Segments count in scan order; the last has no successor and is not read. A short one is the sequence's end, which
    forward is never read and in reverse comes first, where the rows that it lacks add nothing."""
    row_head = tl.program_id(0)
    row = row_head // heads
    head = row_head % heads
    column = tl.program_id(1) * OUT
    part = tl.program_id(2)
    if not DESCRIPTORS:
        b += row.to(tl.int64) * b_row + head.to(tl.int64) * b_head
        c += row.to(tl.int64) * c_row + head.to(tl.int64) * c_head

    dtype: tl.constexpr = b.dtype if DESCRIPTORS else b.dtype.element_ty
    rate = tl.load(decay_pointer + head)
    i = tl.arange(0, CHUNK)
    if REVERSE:
        write_fade = tl.exp(-rate * (i + 1).to(tl.float32))
    else:
        write_fade = tl.exp(-rate * (CHUNK - 1 - i).to(tl.float32))
    across = tl.exp(-rate * CHUNK)

    # exp(-104) is zero in fp32, denormals included: what is further than that from the segment's end leaves nothing.
    if REVERSE:
        start = (segments - 1 - part) * segment
    else:
        start = part * segment
    length = tl.minimum(total - start, segment)
    chunks = tl.cdiv(length, CHUNK)
    reach = tl.minimum(104.0 / tl.maximum(rate, 1e-6), 1e8).to(tl.int32)
    skipped = tl.maximum(chunks - 1 - reach // CHUNK, 0)

    state = tl.zeros([OUT, SUMMED], dtype=tl.float32)
    for step in tl.range(skipped, chunks, num_stages=STAGES):
        if REVERSE:
            begin = (chunks - 1 - step) * CHUNK
        else:
            begin = step * CHUNK
        position = start + begin
        held = begin + i < length
        b_tile = load_tile(b, row, head, position, 0, b_time, summed_width, held, CHUNK, SUMMED, DESCRIPTORS)
        c_t = load_tile(c, row, head, position, column, c_time, c_width, held, CHUNK, OUT, DESCRIPTORS).trans()
        state = tl.dot((c_t * write_fade[None, :]).to(dtype), b_tile, state * across, input_precision="ieee")

    columns = column + tl.arange(0, OUT)
    summed = tl.arange(0, SUMMED)
    at = columns[:, None] * state_c + summed[None, :] * state_summed
    mask = (columns[:, None] < c_width) & (summed[None, :] < summed_width)
    slot = row_head.to(tl.int64) * segments + part + 1
    tl.store(states_pointer + slot * (summed_width * c_width) + at, state, mask=mask)


@triton.jit
def combine_kernel(
    states_pointer,  # [B, heads, segments, size], fp32; slot 0 holds the sequence's own first state
    decay_pointer,  # [heads], fp32
    heads,
    segments,
    segment,  # positions a segment
    first_segment,  # positions in the first of them in scan order
    size,  # elements of a state
    BLOCK: tl.constexpr,
):
    """slot s = exp(-r segment) slot s - 1 + slot s, in order."""
    row_head = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    rate = tl.load(decay_pointer + row_head % heads)
    across = tl.exp(-rate * first_segment.to(tl.float32))
    pointer = states_pointer + row_head.to(tl.int64) * segments * size + at
    state = tl.load(pointer, mask=mask, other=0.0)
    for _ in range(1, segments):
        pointer += size
        state = state * across + tl.load(pointer, mask=mask, other=0.0)
        tl.store(pointer, state, mask=mask)
        across = tl.exp(-rate * segment.to(tl.float32))
