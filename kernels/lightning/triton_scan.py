"""Lightning attention in Triton: one kernel, the decayed scan, which is the forward pass and all three gradients.

    scan(a, b, c)_t = sum over s <= t of exp(-r (t - s)) (a_t . b_s) c_s

is o for (q, k, v) and dq for (do, v, k); with s >= t instead ("reverse") it is dk for (v, do, q) and dv for (k, q, do).
A program owns one head of one row (or document) and a slice of c's width, and walks the chunks with its slice of the
state in registers; nothing is written but the result. See chunked.py for the formulas within a chunk.

Products take operands in the inputs' type and sum in fp32; a fp32 product uses no tf32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.lightning.configs import tile_for


@triton.jit
def _narrow(x, dtype: tl.constexpr):
    """x as an operand of type `dtype`, and the factor it was divided by: 1, except where fp16 would overflow."""
    scale = 1.0
    if dtype == tl.float16:
        # States and scores are unnormalised sums; their product with the other operand may fit fp16 when they do not.
        scale = tl.maximum(tl.max(tl.max(tl.abs(x), axis=1), axis=0) / 4096.0, 1.0)
        x = x / scale
    return x.to(dtype), scale


@triton.jit
def _load(pointer, stride, rows, width, count, columns):
    """A [rows, columns] tile whose rows lie `stride` apart; zero past `count` rows and `width` columns."""
    mask = (rows[:, None] < count) & (columns[None, :] < width)
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def scan_kernel(
    a_pointer,
    b_pointer,
    c_pointer,
    out_pointer,
    decay_pointer,  # [heads], fp32
    first_state_pointer,  # [rows, heads, summed width, c's width], fp32, any strides
    last_state_pointer,
    bounds_pointer,  # cu_seqlens
    total,
    heads,
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
    PACKED: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_LAST: tl.constexpr,
    CHUNK: tl.constexpr,
    SUMMED: tl.constexpr,  # summed_width rounded up to a power of two
    OUT: tl.constexpr,  # the slice of c's width that this program owns
):
    row_head = tl.program_id(0).to(tl.int64)
    row = row_head // heads
    head = row_head % heads
    if PACKED:
        start = tl.load(bounds_pointer + row).to(tl.int64)
        length = tl.load(bounds_pointer + row + 1) - start
        row = row * 0
    else:
        start = row * 0
        length = total
    a_pointer += row * a_row + head * a_head
    b_pointer += row * b_row + head * b_head
    c_pointer += row * c_row + head * c_head
    out_pointer += row * out_row + head * out_head

    i = tl.arange(0, CHUNK)
    summed = tl.arange(0, SUMMED)
    column = tl.program_id(1) * OUT + tl.arange(0, OUT)
    state_at = row_head * summed_width * c_width + summed[:, None] * state_summed + column[None, :] * state_c
    state_mask = (summed[:, None] < summed_width) & (column[None, :] < c_width)
    if HAS_FIRST:
        state = tl.load(first_state_pointer + state_at, mask=state_mask, other=0.0)
    else:
        state = tl.zeros([SUMMED, OUT], dtype=tl.float32)

    dtype: tl.constexpr = a_pointer.dtype.element_ty
    rate = tl.load(decay_pointer + head)
    distance = i[:, None] - i[None, :]
    if REVERSE:
        distance = -distance
    within = tl.where(distance >= 0, tl.exp(-rate * tl.maximum(distance, 0).to(tl.float32)), 0.0)
    from_start = tl.exp(-rate * (i + 1).to(tl.float32))

    chunks = tl.cdiv(length, CHUNK)
    for step in range(chunks):
        if REVERSE:
            begin = (chunks - 1 - step) * CHUNK
        else:
            begin = step * CHUNK
        position = start + begin  # 64 bits: its product with a stride passes 2^31
        count = tl.minimum(length - begin, CHUNK)
        to_end = tl.exp(-rate * tl.maximum(count - 1 - i, 0).to(tl.float32))
        if REVERSE:
            read_fade = to_end
            write_fade = from_start
        else:
            read_fade = from_start
            write_fade = to_end

        a = _load(a_pointer + position * a_time, a_time, i, summed_width, count, summed)
        b = _load(b_pointer + position * b_time, b_time, i, summed_width, count, summed)
        c = _load(c_pointer + position * c_time, c_time, i, c_width, count, column)

        scores = tl.dot(a, tl.trans(b), input_precision="ieee") * within
        scores, scores_scale = _narrow(scores, dtype)
        carried, carried_scale = _narrow(state, dtype)
        out = tl.dot(a, carried, input_precision="ieee") * (read_fade[:, None] * carried_scale)
        out += tl.dot(scores, c, input_precision="ieee") * scores_scale
        out_mask = (i[:, None] < count) & (column[None, :] < c_width)
        out_at = position * out_time + i[:, None] * out_time + column[None, :]
        tl.store(out_pointer + out_at, out.to(out_pointer.dtype.element_ty), mask=out_mask)

        faded = (c.to(tl.float32) * write_fade[:, None]).to(dtype)
        state = state * tl.exp(-rate * count.to(tl.float32)) + tl.dot(tl.trans(b), faded, input_precision="ieee")

    if HAS_LAST:
        tl.store(last_state_pointer + state_at, state, mask=state_mask)


def forward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """o in v's type and the final state in fp32; shapes as in `kernels.lightning_attention`."""
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    state = _new_state(q, v, cu_seqlens)
    _scan(q, k, v, o, decay, cu_seqlens, first=initial_state, last=state)
    return o, state


def backward(
    do: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the initial state (fp32). do [B, T, H, V]; dstate None means zero."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dinitial = _new_state(q, v, cu_seqlens)
    _scan(do, v, k, dq, decay, cu_seqlens, first=initial_state, transposed=True)
    _scan(v, do, q, dk, decay, cu_seqlens, first=dstate, transposed=True, reverse=True)
    _scan(k, q, do, dv, decay, cu_seqlens, first=dstate, last=dinitial, reverse=True)
    return dq, dk, dv, dinitial


def _scan(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    out: Tensor,
    decay: Tensor,
    cu_seqlens: Tensor | None,
    *,
    first: Tensor | None = None,
    last: Tensor | None = None,
    transposed: bool = False,
    reverse: bool = False,
) -> None:
    """out [B, T, H, C] = scan(a, b, c). first, last: the states to start from and to write, [rows, H, K, V] of which
    the kernel sums over K, or over V when `transposed`."""
    a, b, c = (x if x.stride(-1) == 1 else x.contiguous() for x in (a, b, c))
    first = None if first is None else first.to(torch.float32).contiguous()
    batch, total, heads, summed_width = a.shape
    c_width = c.shape[-1]
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    summed = max(16, triton.next_power_of_2(summed_width))
    capability = torch.cuda.get_device_capability(a.device)[0] if a.is_cuda else 9
    tile = tile_for(capability, a.element_size(), summed, max(16, triton.next_power_of_2(c_width)))
    with torch.cuda.device_of(a):  # Triton launches on the current device
        scan_kernel[(rows * heads, triton.cdiv(c_width, tile.out))](
            a,
            b,
            c,
            out,
            decay.to(torch.float32),
            first,
            last,
            cu_seqlens,
            total,
            heads,
            summed_width,
            c_width,
            *a.stride()[:3],
            *b.stride()[:3],
            *c.stride()[:3],
            *out.stride()[:3],
            *((1, summed_width) if transposed else (c_width, 1)),
            REVERSE=reverse,
            PACKED=cu_seqlens is not None,
            HAS_FIRST=first is not None,
            HAS_LAST=last is not None,
            CHUNK=tile.chunk,
            SUMMED=summed,
            OUT=tile.out,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )


def _new_state(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return torch.empty(rows, q.shape[2], q.shape[3], v.shape[3], dtype=torch.float32, device=q.device)
