"""Lightning attention in Triton: one kernel, the decayed scan, which is the forward pass and all three gradients.

    scan(a, b, c)_t = sum over s <= t of exp(-r (t - s)) (a_t . b_s) c_s

is o for (q, k, v) and dq for (do, v, k); with s >= t instead ("reverse") it is dk for (v, do, q) and dv for (k, q, do).
A program owns one head of one piece (a sequence or a segment of one) and a slice of c's width, and walks the chunks
with its slice of the state in registers; nothing is written but the result. See chunked.py for the formulas within a
chunk, triton_segments.py for the states that segments start from, launch.py for the sizes.

Queries and keys may come raw, their feature map applied to each tile as it is read. Either the two operands that are
summed over are features (o, dv), or c and the result are (dq, dk), whose gradient then runs back through the map. LRPE
makes two features of each element, the parts with the cosine and with the sine, which are handled as two tiles with two
states: a width of 2d is never in memory.

theta's gradient is the sum over pairs of (t - s) w_ts, where sum_s w_ts is what dq says of theta at t and -sum_t w_ts
what dk says at s. Multiplying these by t and s would have terms of the size of t cancel. Here they are multiplied by
the position within a stretch of FLOW positions, counted from its middle, and the dk scan adds, at each boundary
between stretches, FLOW times the sum of w over the pairs on both sides: a product of the two states there, of which
the dq scan has left the other. Both take w from the same rounded features: within a chunk the terms cancel exactly.

Everything is transposed, [slice of c's width, ...], because the tensor cores of Hopper take their left operand from
registers: the state and c then stand there as they are, and of a chunk only the small square of scores passes through
shared memory. Products take operands in the inputs' type and sum in fp32; a fp32 product uses no tf32.

Only the chunk at a sequence's end may be partly filled. Its missing rows lie beyond the sequence, where descriptors
read zeros and write nothing, and matter to the fading alone: of the state that the forward scan hands on, and of the
state that the reverse scan starts from.
"""

import triton
import triton.language as tl

from kernels.lightning.triton_features import activate, slope, table_row, turned
from kernels.lightning.triton_place import find_piece

PLAIN = tl.constexpr(0)  # which operands are features
SUMMED_SIDE = tl.constexpr(1)
OUT_SIDE = tl.constexpr(2)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """x as an operand of type `dtype`, and the factor it was divided by: 1, except where fp16 would overflow."""
    scale = 1.0
    if dtype == tl.float16:
        # States and scores are unnormalised sums; their product with the other operand may fit fp16 when they do not.
        scale = tl.maximum(tl.max(tl.max(tl.abs(x), axis=1), axis=0) / 4096.0, 1.0)
        x = x / scale
    return x.to(dtype), scale


@triton.jit
def load_tile(x, row, head, position, column, time_stride, width, held, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
              DESCRIPTORS: tl.constexpr):  # fmt: skip
    """The [ROWS, COLUMNS] tile of x at `position` and `column`, zero outside the sequence and past `width`.

    x: a descriptor of [B, T, H, width], or a pointer to position 0 of the row and head, whose rows lie `time_stride`
    apart and of which `held` [ROWS] says which to read.
    """
    if DESCRIPTORS:
        return x.load([row, position, head, column]).reshape(ROWS, COLUMNS)
    else:
        columns = column + tl.arange(0, COLUMNS)
        mask = held[:, None] & (columns[None, :] < width)
        pointers = x + position.to(tl.int64) * time_stride + (tl.arange(0, ROWS)[:, None] * time_stride + columns)
        return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def fenced(x, dtype: tl.constexpr):
    """x, computed where its tile was loaded: the compiler else moves the map behind the change to a tensor core's
    operand layout, which repeats every element over several threads, and runs out of registers."""
    if dtype == tl.bfloat16:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)
    else:
        return x


@triton.jit
def to_features(x, cos, sin, ok, dtype: tl.constexpr, ACT: tl.constexpr, LRPE: tl.constexpr):
    """The tile's features, twice the same without LRPE. ok: where x is not padding, which may have features too."""
    wide = activate(x.to(tl.float32), ACT, dtype == tl.bfloat16)
    if ACT == 2:
        wide = tl.where(ok, wide, 0.0)
    if LRPE:
        return fenced((wide * cos).to(dtype), dtype), fenced((wide * sin).to(dtype), dtype)
    else:
        feature = fenced(wide.to(dtype), dtype)
        return feature, feature


@triton.jit
def scan_kernel(
    a,  # [B, T, H, summed width], a descriptor or a pointer, as are b, c and out
    b,  # [B, T, H, summed width]
    c,  # [B, T, H, c's width]
    out,  # [B, T, H, c's width]; a pointer in any case when PACKED: documents must not write into each other
    raw,  # OUT_SIDE: pointer to what the result is the gradient of, [B, T, H, c's width]
    decay_pointer,  # [heads], fp32
    first_state_pointer,  # [pieces, heads, summed width, c's width], fp32, any strides
    last_state_pointer,  # [sequences, heads, summed width, c's width]
    bounds_pointer,  # see find_piece
    document_pointer,
    first_pointer,
    within_pointer,  # tables of cos and sin: within a chunk, [heads, CHUNK, 2, width]
    chunk_pointer,  # of the chunks' starts in their sequence, [heads, chunk_rows, 2, width], fp32
    begin_pointer,  # of the sequences' starts, [heads, sequences, 2, width], fp32
    flow_pointer,  # [programs / slices, c's width], fp32: each program's part of theta's gradient
    crossing_pointer,  # [stretches, heads, slices, 2, OUT, SUMMED]: states between stretches
    total,
    heads,
    segments,
    segment,  # positions a segment, a multiple of CHUNK where there are several
    sequences,
    chunk_rows,
    slices,
    summed_width,
    c_width,
    a_row,  # strides in elements: from row to row, from position to position, from head to head
    a_time,
    a_head,
    b_row,
    b_time,
    b_head,
    c_row,
    c_time,
    c_head,
    out_row,
    out_time,
    out_head,
    raw_row,
    raw_time,
    raw_head,
    state_summed,  # strides of both states within [summed width, c's width]; a head's state is contiguous
    state_c,
    state_other,  # from a state's cosine half to its sine half
    state_size,
    REVERSE: tl.constexpr,
    RAGGED: tl.constexpr,  # whether a chunk may be partly filled
    PACKED: tl.constexpr,
    CUT: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_LAST: tl.constexpr,
    FEATURES: tl.constexpr,  # PLAIN, SUMMED_SIDE or OUT_SIDE
    ACT: tl.constexpr,
    LRPE: tl.constexpr,
    FLOW: tl.constexpr,  # 0, or the length of a stretch: theta's gradient is wanted
    DESCRIPTORS: tl.constexpr,
    CHUNK: tl.constexpr,
    SUMMED: tl.constexpr,  # summed_width rounded up to a power of two
    OUT: tl.constexpr,  # the slice of c's width that this program owns
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    column = (program % slices) * OUT
    piece_head = program // slices
    head = piece_head % heads
    number, start, length, offset, held_length, is_last = find_piece(
        piece_head // heads, total, segments, segment, bounds_pointer, document_pointer, first_pointer, sequences,
        REVERSE, PACKED, CUT
    )  # fmt: skip
    if PACKED:
        row = number * 0
    else:
        row = number
    if not DESCRIPTORS:
        a += row.to(tl.int64) * a_row + head.to(tl.int64) * a_head
        b += row.to(tl.int64) * b_row + head.to(tl.int64) * b_head
        c += row.to(tl.int64) * c_row + head.to(tl.int64) * c_head
    if PACKED or not DESCRIPTORS:
        out += row.to(tl.int64) * out_row + head.to(tl.int64) * out_head
    if FEATURES == OUT_SIDE:
        raw += row.to(tl.int64) * raw_row + head.to(tl.int64) * raw_head

    i = tl.arange(0, CHUNK)
    summed = tl.arange(0, SUMMED)
    columns = column + tl.arange(0, OUT)
    state_at = columns[:, None] * state_c + summed[None, :] * state_summed
    state_mask = (columns[:, None] < c_width) & (summed[None, :] < summed_width)
    state = tl.zeros([OUT, SUMMED], dtype=tl.float32)
    if LRPE:
        other = tl.zeros([OUT, SUMMED], dtype=tl.float32)
    if HAS_FIRST:
        first_at = first_state_pointer + piece_head.to(tl.int64) * state_size + state_at
        state = tl.load(first_at, mask=state_mask, other=0.0)
        if LRPE:
            other = tl.load(first_at + state_other, mask=state_mask, other=0.0)

    # within[j, i] = exp(-r |i - j|) on the side that i may see. `near`: how far a row is from the state that the chunk
    # starts with; what it writes fades over the rest of the chunk.
    dtype: tl.constexpr = a.dtype if DESCRIPTORS else a.dtype.element_ty
    rate = tl.load(decay_pointer + head)
    if REVERSE:
        distance = i[:, None] - i[None, :]
        near = CHUNK - 1 - i
    else:
        distance = i[None, :] - i[:, None]
        near = i + 1
    within = tl.where(distance >= 0, tl.exp(-rate * tl.maximum(distance, 0).to(tl.float32)), 0.0)
    read_fade = tl.exp(-rate * near.to(tl.float32))
    write_fade = tl.exp(-rate * (CHUNK - near).to(tl.float32))
    across = tl.exp(-rate * CHUNK)

    if FEATURES == OUT_SIDE:
        angles = columns
        angle_width = c_width
    else:
        angles = summed
        angle_width = summed_width
    ok_columns = angles < angle_width
    if LRPE:
        cos_within, sin_within = table_row(within_pointer, head, CHUNK, i[:, None], angles[None, :], angle_width)
        if begin_pointer is not None:
            cos_begin, sin_begin = table_row(begin_pointer, head, sequences, number, angles, angle_width)
    if FLOW:
        flow = tl.zeros([OUT], dtype=tl.float32)
        crossing = tl.zeros([OUT], dtype=tl.float32)
        # Slots of a sequence's stretches: sequences of a row share a boundary's number, but for one more each.
        if PACKED:
            stretch = start // FLOW + number
        else:
            stretch = number * ((total + FLOW - 1) // FLOW)

    chunks = tl.cdiv(held_length, CHUNK)
    for step in tl.range(0, chunks, num_stages=STAGES):
        if REVERSE:
            begin = (chunks - 1 - step) * CHUNK
        else:
            begin = step * CHUNK
        position = start + offset + begin
        held = begin + i < held_length
        if LRPE:
            cos, sin = table_row(chunk_pointer, head, chunk_rows, (offset + begin) // CHUNK, angles, angle_width)
            if begin_pointer is not None:
                cos, sin = turned(cos, sin, cos_begin, sin_begin)
            cos, sin = turned(cos_within, sin_within, cos[None, :], sin[None, :])
        else:
            cos, sin = 1.0, 0.0
        if RAGGED and (HAS_FIRST if REVERSE else HAS_LAST):
            rows = tl.minimum(held_length - begin, CHUNK)
            if REVERSE:
                near = rows - 1 - i
            read_fade = tl.exp(-rate * tl.maximum(near, 0).to(tl.float32))
            write_fade = tl.exp(-rate * tl.maximum(rows - near, 0).to(tl.float32))
            across = tl.exp(-rate * rows.to(tl.float32))

        if FLOW:
            boundary = offset + begin + (CHUNK if REVERSE else 0)
            slot = ((stretch + boundary // FLOW).to(tl.int64) * heads + head) * slices + program % slices
            kept = crossing_pointer + slot * (2 * OUT * SUMMED)
            crossing_at = tl.arange(0, OUT)[:, None] * SUMMED + summed[None, :]
            if REVERSE:
                if (boundary % FLOW == 0) & (boundary < length):
                    crossing += tl.sum(state * tl.load(kept + OUT * SUMMED + crossing_at).to(tl.float32), axis=1)
                    crossing -= tl.sum(other * tl.load(kept + crossing_at).to(tl.float32), axis=1)
            else:
                if (boundary % FLOW == 0) & (boundary > 0):
                    kind = crossing_pointer.dtype.element_ty
                    tl.store(kept + crossing_at, state.to(kind))
                    tl.store(kept + OUT * SUMMED + crossing_at, other.to(kind))

        a_tile = load_tile(a, row, head, position, 0, a_time, summed_width, held, CHUNK, SUMMED, DESCRIPTORS)
        b_tile = load_tile(b, row, head, position, 0, b_time, summed_width, held, CHUNK, SUMMED, DESCRIPTORS)
        c_tile = load_tile(c, row, head, position, column, c_time, c_width, held, CHUNK, OUT, DESCRIPTORS)
        ok = held[:, None] & ok_columns[None, :]
        if FEATURES == SUMMED_SIDE:
            a_tile, a_other = to_features(a_tile, cos, sin, ok, dtype, ACT, LRPE)
            b_tile, b_other = to_features(b_tile, cos, sin, ok, dtype, ACT, LRPE)
        if FEATURES == OUT_SIDE:
            c_tile, c_other = to_features(c_tile, cos, sin, ok, dtype, ACT, LRPE)
        a_t = a_tile.trans()
        c_t = c_tile.trans()
        scores = tl.dot(b_tile, a_t, input_precision="ieee")
        if LRPE and FEATURES == SUMMED_SIDE:
            scores = tl.dot(b_other, a_other.trans(), scores, input_precision="ieee")
        scores *= within
        if PACKED:  # descriptors have read on into the next document
            scores = tl.where(held[:, None], scores, 0.0)
            c_t = tl.where(held[None, :], c_t, 0.0)
        scores, scores_scale = narrow(scores, dtype)
        carried, carried_scale = narrow(state, dtype)
        if LRPE and FEATURES == SUMMED_SIDE:
            tile = tl.dot(carried, a_t, input_precision="ieee")
            carried, other_scale = narrow(other, dtype)
            if dtype == tl.float16:
                tile = tile * carried_scale
                tile += tl.dot(carried, a_other.trans(), input_precision="ieee") * other_scale
            else:
                tile = tl.dot(carried, a_other.trans(), tile, input_precision="ieee")
            tile = tile * read_fade[None, :]
        else:
            tile = tl.dot(carried, a_t, input_precision="ieee") * (read_fade * carried_scale)[None, :]
        if dtype == tl.float16:
            tile += tl.dot(c_t, scores, input_precision="ieee") * scores_scale
        else:
            tile = tl.dot(c_t, scores, tile, input_precision="ieee")

        if FEATURES == OUT_SIDE:  # not earlier: it would hold registers through the products
            raw_tile = load_tile(raw, row, head, position, column, raw_time, c_width, held, CHUNK, OUT, False)
        faded = (c_t * write_fade[None, :]).to(dtype)
        if LRPE and FEATURES == OUT_SIDE:
            carried, carried_scale = narrow(other, dtype)
            other_tile = tl.dot(carried, a_t, input_precision="ieee") * (read_fade * carried_scale)[None, :]
            other_t = c_other.trans()
            if PACKED:
                other_t = tl.where(held[None, :], other_t, 0.0)
            if dtype == tl.float16:
                other_tile += tl.dot(other_t, scores, input_precision="ieee") * scores_scale
            else:
                other_tile = tl.dot(other_t, scores, other_tile, input_precision="ieee")
            other_faded = (other_t * write_fade[None, :]).to(dtype)
            other = tl.dot(other_faded, b_tile, other * across, input_precision="ieee")
        if LRPE and FEATURES == SUMMED_SIDE:
            other = tl.dot(faded, b_other, other * across, input_precision="ieee")
        state = tl.dot(faded, b_tile, state * across, input_precision="ieee")

        if FEATURES != OUT_SIDE:
            result = tile.to(dtype).trans()
        else:
            result = tile.trans()
            if LRPE:
                result_sin = other_tile.trans()
                if FLOW:
                    x_cos, x_sin = to_features(raw_tile, cos, sin, ok, dtype, ACT, LRPE)
                    terms = x_cos.to(tl.float32) * result_sin - x_sin.to(tl.float32) * result
                    place = (offset + begin + i) % FLOW - (FLOW - 1) * 0.5
                    flow += tl.sum(tl.where(ok, terms * place[:, None], 0.0), axis=0)
                result = result * cos + result_sin * sin
            result *= slope(raw_tile.to(tl.float32), ACT, dtype == tl.bfloat16)
        if PACKED or not DESCRIPTORS:
            mask = (columns[None, :] < c_width) & held[:, None]
            out_at = position.to(tl.int64) * out_time + (i[:, None] * out_time + columns[None, :])
            tl.store(out + out_at, result.to(dtype), mask=mask)
        else:
            out.store([row, position, head, column], result.to(dtype).reshape(1, CHUNK, 1, OUT))

    if HAS_LAST and is_last:
        last_at = last_state_pointer + (number * heads + head).to(tl.int64) * state_size + state_at
        tl.store(last_at, state, mask=state_mask)
        if LRPE:
            tl.store(last_at + state_other, other, mask=state_mask)
    if FLOW:
        flow += FLOW * crossing
        tl.store(flow_pointer + piece_head.to(tl.int64) * c_width + columns, flow, mask=columns < c_width)
