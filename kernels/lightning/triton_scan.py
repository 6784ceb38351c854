"""Lightning attention in Triton: one kernel, the decayed scan, computes the output and all three gradients.

    scan(a, b, c)_t = sum over s <= t of exp(-r (t - s)) (a_t . b_s) c_s

is o for (q, k, v) and dq for (do, v, k); the reverse scan, over s >= t, is dk for (v, do, q) and dv for (k, q, do). A
program owns one head of one piece (a sequence or a segment) and a slice of c's columns. It loops over the piece's
chunks with its slice of the state in registers, and writes only the result. chunked.py has the formulas of a chunk,
triton_segments.py the segments' initial states, scan.py the launch.

With LRPE the scans of dq and dk also compute the far part of dtheta: see CROSSING below.

All tiles are transposed, [slice of c's columns, ...]: Hopper's tensor cores can read their left operand from
registers, so the state and c stay in registers, and only the CHUNK x CHUNK scores of a chunk pass through shared
memory. Products take operands in the inputs' type and accumulate in fp32; fp32 products do not use tf32.

Only the last chunk of a sequence may be partial. Its missing positions are read as zeros, or as the next packed
document, and would decay the state that a forward scan returns or a reverse scan starts from. Where that matters
(RAGGED), the partial chunk has its own loop with masks, and the loop over full chunks has none.
"""

import triton
import triton.language as tl

from kernels.lightning.triton_sequences import find_piece


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """(x / factor in `dtype`, factor). factor: 1, except for fp16, where |x| / factor <= 4096."""
    scale = 1.0
    if dtype == tl.float16:
        # States and scores are unnormalised sums and may exceed 65504, even if their product with the other operand,
        # scaled back in fp32, does not.
        scale = tl.maximum(tl.max(tl.max(tl.abs(x), axis=1), axis=0) / 4096.0, 1.0)
        x = x / scale
    return x.to(dtype), scale


@triton.jit
def load_tile(x, row, head, position, column, time_stride, width, held, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
              DESCRIPTORS: tl.constexpr):  # fmt: skip
    """The [ROWS, COLUMNS] tile of x at `position` and `column`, zero outside the row of the batch and past `width`.

    x: a TMA descriptor of [B, T, H, width]; or a pointer to position 0 of the row and head, with `time_stride` elements
    between positions; only positions where `held` [ROWS] is true are read.
    """
    if DESCRIPTORS:
        return x.load([row, position, head, column]).reshape(ROWS, COLUMNS)
    else:
        columns = column + tl.arange(0, COLUMNS)
        mask = held[:, None] & (columns[None, :] < width)
        pointers = x + position.to(tl.int64) * time_stride + (tl.arange(0, ROWS)[:, None] * time_stride + columns)
        return tl.load(pointers, mask=mask, other=0.0)


# CROSSING. The far part of dtheta (kernels/gla/theta_gradient.py) is a sum over the boundaries between stretches of
# CROSSING positions: CROSSING times the sum of w_ts over the pairs with s before and t after the boundary. The inner
# sum is a product of two states at the boundary: the forward state S of k and v, which the scan of dq carries, and the
# reverse state G of q and do, which the scan of dk carries: cosine rows of one times sine rows of the other, minus sine
# rows times cosine rows. The scan of dq writes S to `crossing`; the scan of dk accumulates the products in `flow`.
@triton.jit
def scan_kernel(
    a,  # [B, T, H, summed width]; a, b, c and out: TMA descriptors, or pointers
    b,  # [B, T, H, summed width]
    c,  # [B, T, H, c's width]
    out,  # [B, T, H, c's width]
    out_pointer,  # out as a pointer: a packed document's last chunk is stored masked, not into the next document
    decay_pointer,  # [heads], fp32
    first_state_pointer,  # [pieces, heads, summed width, c's width], fp32: the initial state of each piece
    last_state_pointer,  # [sequences, heads, summed width, c's width], fp32, written
    bounds_pointer,  # see find_piece
    document_pointer,
    first_pointer,
    crossing_pointer,  # [stretches, heads, c's width, summed width]: states between stretches
    flow_pointer,  # [pieces, heads, c's width], fp32
    total,
    heads,
    segments,
    segment,  # positions per segment, a multiple of CHUNK where there are several
    sequences,
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
    state_summed,  # strides of both states within [summed width, c's width]; a head's state is contiguous
    state_c,
    REVERSE: tl.constexpr,
    RAGGED: tl.constexpr,  # whether a partial last chunk needs masks
    PACKED: tl.constexpr,
    CUT: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    FROM_ZERO: tl.constexpr,  # whether sequences start from zero: the initial states of their first pieces are not read
    HAS_LAST: tl.constexpr,
    CROSSING: tl.constexpr,  # 0, or the length of a stretch
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
    number, start, length, offset, held_length, is_later, is_last = find_piece(
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
        out_pointer += row.to(tl.int64) * out_row + head.to(tl.int64) * out_head

    i = tl.arange(0, CHUNK)
    summed = tl.arange(0, SUMMED)
    columns = column + tl.arange(0, OUT)
    state_at = columns[:, None] * state_c + summed[None, :] * state_summed
    state_mask = (columns[:, None] < c_width) & (summed[None, :] < summed_width)
    state_size = summed_width * c_width
    if HAS_FIRST:
        first_at = first_state_pointer + piece_head.to(tl.int64) * state_size + state_at
        state = tl.load(first_at, mask=state_mask & is_later if FROM_ZERO else state_mask, other=0.0)
    else:
        state = tl.zeros([OUT, SUMMED], dtype=tl.float32)

    # within[j, i] = exp(-r |i - j|) for j <= i, or in reverse for j >= i; else 0.
    dtype: tl.constexpr = a.dtype if DESCRIPTORS else a.dtype.element_ty
    rate = tl.load(decay_pointer + head)
    if REVERSE:
        distance = i[:, None] - i[None, :]
    else:
        distance = i[None, :] - i[:, None]
    within = tl.where(distance >= 0, tl.exp(-rate * tl.maximum(distance, 0).to(tl.float32)), 0.0)

    if CROSSING:
        # The first slot of this sequence in `crossing`: one slot per boundary, and one extra per packed document, whose
        # length the host does not know.
        if PACKED:
            slot = start // CROSSING + number
        else:
            slot = number * ((total + CROSSING - 1) // CROSSING)
        flow = tl.zeros([OUT], dtype=tl.float32)

    chunks = tl.cdiv(held_length, CHUNK)
    split = chunks
    if RAGGED:
        split = held_length // CHUNK
    if REVERSE:
        split = chunks - split
    PARTIAL: tl.constexpr = 0 if REVERSE else 1  # which of the two loops has the partial chunk
    WHOLE: tl.constexpr = 1 - PARTIAL
    for part in tl.static_range(0 if RAGGED else WHOLE, 2 if RAGGED else WHOLE + 1):
        # `near`: distance of a row from the chunk's initial state; its contribution to the state decays over the rest.
        rows = held_length % CHUNK if part == PARTIAL else CHUNK
        near = rows - 1 - i if REVERSE else i + 1
        read_fade = tl.exp(-rate * tl.maximum(near, 0))
        write_fade = tl.exp(-rate * tl.maximum(rows - near, 0))
        across = tl.exp(-rate * rows)
        for step in tl.range(0 if part == 0 else split, split if part == 0 else chunks, num_stages=STAGES):
            if REVERSE:
                begin = (chunks - 1 - step) * CHUNK
            else:
                begin = step * CHUNK
            position = start + offset + begin
            held = begin + i < held_length

            if CROSSING:
                boundary = offset + begin + (CHUNK if REVERSE else 0)
                kept = crossing_pointer + ((slot + boundary // CROSSING) * heads + head).to(tl.int64) * state_size
                if REVERSE:
                    if (boundary % CROSSING == 0) & (boundary < length):
                        half = c_width // 2
                        partner = tl.where(columns < half, columns + half, columns - half)
                        before = tl.load(
                            kept + partner[:, None] * summed_width + summed[None, :], mask=state_mask, other=0.0
                        )
                        turn = tl.sum(state * before.to(tl.float32), axis=1)
                        flow += tl.where(columns < half, turn, -turn)
                else:
                    if (boundary % CROSSING == 0) & (boundary > 0):
                        at = kept + columns[:, None] * summed_width + summed[None, :]
                        tl.store(at, state.to(crossing_pointer.dtype.element_ty), mask=state_mask)

            a_t = load_tile(a, row, head, position, 0, a_time, summed_width, held, CHUNK, SUMMED, DESCRIPTORS).trans()
            b_tile = load_tile(b, row, head, position, 0, b_time, summed_width, held, CHUNK, SUMMED, DESCRIPTORS)
            c_t = load_tile(c, row, head, position, column, c_time, c_width, held, CHUNK, OUT, DESCRIPTORS).trans()
            if PACKED and part == PARTIAL:  # a TMA tile extends into the next document
                a_t = tl.where(held[None, :], a_t, 0.0)
                b_tile = tl.where(held[:, None], b_tile, 0.0)
                c_t = tl.where(held[None, :], c_t, 0.0)

            scores = tl.dot(b_tile, a_t, input_precision="ieee") * within
            scores, scores_scale = narrow(scores, dtype)
            carried, carried_scale = narrow(state, dtype)
            tile = tl.dot(carried, a_t, input_precision="ieee") * (read_fade * carried_scale)[None, :]
            if dtype == tl.float16:
                tile += tl.dot(c_t, scores, input_precision="ieee") * scores_scale
            else:
                tile = tl.dot(c_t, scores, tile, input_precision="ieee")

            if DESCRIPTORS and not (PACKED and part == PARTIAL):
                out.store([row, position, head, column], tile.to(dtype).trans().reshape(1, CHUNK, 1, OUT))
            else:
                mask = (columns[:, None] < c_width) & held[None, :]
                out_at = position.to(tl.int64) * out_time + (i[None, :] * out_time + columns[:, None])
                tl.store(out_pointer + out_at, tile.to(dtype), mask=mask)

            faded = (c_t * write_fade[None, :]).to(dtype)
            state = tl.dot(faded, b_tile, state * across, input_precision="ieee")

    if HAS_LAST and is_last:
        last_at = last_state_pointer + (number * heads + head).to(tl.int64) * state_size + state_at
        tl.store(last_at, state, mask=state_mask)
    if CROSSING and REVERSE:
        tl.store(flow_pointer + piece_head.to(tl.int64) * c_width + columns, flow, mask=columns < c_width)
