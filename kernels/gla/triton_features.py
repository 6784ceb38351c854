"""The feature map of q and k in Triton: the activation, and LRPE's cosines and sines.

One kernel reads q and k from the fused projection and writes their features; another reads the features' gradients and
writes dq and dk. Computing features within the scan was slower: TMA bulk copies bring tiles to shared memory, where the
tensor cores read them directly, and a feature map would have to rewrite them first.

Angles theta t are computed in turns: theta / 2 pi, an integer in units of 2^-64, times the integer t. Integer overflow
drops exactly the whole turns, so angles at positions in the millions are as exact as at small ones.
"""

import triton
import triton.language as tl

from kernels.activations.triton_activations import activate, slope
from kernels.quantize.triton_quantize import magnitude_bits


@triton.jit
def turn_fraction(theta):
    """theta / 2 pi modulo 1, as a signed integer in units of 2^-64."""
    turns = theta.to(tl.float64) * 0.15915494309189535
    turns -= tl.floor(turns + 0.5)
    return (turns * 18446744073709551616.0).to(tl.int64)


@triton.jit
def cos_sin(position, fraction, QUICK: tl.constexpr):
    """cos and sin of theta t, [rows, columns] fp32, of positions t [rows] int64 and turn_fraction(theta) [columns]."""
    turned = (position[:, None] * fraction[None, :]) >> 32
    angle = turned.to(tl.float32) * 1.4629180792671596e-09  # 2 pi / 2^32
    if QUICK:
        cos = tl.inline_asm_elementwise("cos.approx.f32 $0, $1;", "=f,f", [angle], tl.float32, is_pure=True, pack=1)
        sin = tl.inline_asm_elementwise("sin.approx.f32 $0, $1;", "=f,f", [angle], tl.float32, is_pure=True, pack=1)
    else:
        cos, sin = tl.cos(angle), tl.sin(angle)
    return cos, sin


@triton.jit
def turn_of(
    theta_at,  # of the row's head, [d]
    positions_pointer,  # [B] or [1], or None: 0
    positions_row,
    row,
    feature,  # [COUNT], of 0 .. 2 d - 1
    source,  # [COUNT]: each feature's channel of the head
    held,
    QUICK: tl.constexpr,
    COUNT: tl.constexpr,
):
    """LRPE's factors of features of one token's q and k, fp32 [COUNT]: cos(theta t) of the first d, sin(theta t) of the
    others."""
    position = tl.zeros([1], tl.int64)
    if positions_pointer is not None:
        position += tl.load(positions_pointer + row * positions_row).to(tl.int64)
    fraction = turn_fraction(tl.load(theta_at + source, mask=held, other=0.0))
    cos, sin = cos_sin(position, fraction, QUICK)
    return tl.where(source == feature, tl.reshape(cos, [COUNT]), tl.reshape(sin, [COUNT]))


@triton.jit
def positions_of(token, total, positions_pointer, positions_row, positions_time, held):
    """The position of each token, int64; its index in its row where positions_pointer is None."""
    row = token // total
    place = token - row * total
    if positions_pointer is not None:
        at = positions_pointer + row.to(tl.int64) * positions_row + place * positions_time
        return tl.load(at, mask=held, other=0).to(tl.int64)
    else:
        return place.to(tl.int64)


@triton.jit
def features_kernel(
    x_pointer,  # [tokens, 4 D]: q | k | v | u, D = H d
    theta_pointer,  # [D], or None: no LRPE
    positions_pointer,  # [T] or [B, T], or None: 0, 1, ... in every row
    features_pointer,  # [tokens, 2, D]; with LRPE [tokens, 2, H, 2, d], cosine and sine half
    x_row,
    tokens,
    total,
    positions_row,
    positions_time,
    width,  # D
    head_width,  # d
    QUERIES: tl.constexpr,  # whether to write the features of q
    KEYS: tl.constexpr,  # whether to write the features of k
    ACT: tl.constexpr,
    QUICK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    held = token < tokens
    mask = held[:, None] & (column < width)[None, :]
    x_at = x_pointer + token.to(tl.int64)[:, None] * x_row + column[None, :]
    if theta_pointer is not None:
        fraction = turn_fraction(tl.load(theta_pointer + column, mask=column < width, other=0.0))
        position = positions_of(token, total, positions_pointer, positions_row, positions_time, held)
        cos, sin = cos_sin(position, fraction, QUICK)
        doubled = column + (column // head_width) * head_width
        at = features_pointer + token.to(tl.int64)[:, None] * (4 * width) + doubled[None, :]
        if QUERIES:
            store_turned(x_at, at, head_width, cos, sin, mask, ACT, QUICK)
        if KEYS:
            store_turned(x_at + width, at + 2 * width, head_width, cos, sin, mask, ACT, QUICK)
    else:
        at = features_pointer + token.to(tl.int64)[:, None] * (2 * width) + column[None, :]
        if QUERIES:
            store_activated(x_at, at, mask, ACT, QUICK)
        if KEYS:
            store_activated(x_at + width, at + width, mask, ACT, QUICK)


@triton.jit
def store_activated(x_at, at, mask, ACT: tl.constexpr, QUICK: tl.constexpr):
    x = activate(tl.load(x_at, mask=mask, other=0.0).to(tl.float32), ACT, QUICK)
    tl.store(at, x.to(at.dtype.element_ty), mask=mask)


@triton.jit
def store_turned(x_at, at, head_width, cos, sin, mask, ACT: tl.constexpr, QUICK: tl.constexpr):
    x = activate(tl.load(x_at, mask=mask, other=0.0).to(tl.float32), ACT, QUICK)
    tl.store(at, (x * cos).to(at.dtype.element_ty), mask=mask)
    tl.store(at + head_width, (x * sin).to(at.dtype.element_ty), mask=mask)


@triton.jit
def feature_gradients_kernel(
    x_pointer,  # [tokens, 4 D]: q | k | v | u
    theta_pointer,
    positions_pointer,
    weight_pointer,  # [total] fp32: distances_from_middle, for packed documents; None: computed here
    gradient_pointer,  # the features' gradients, laid out as the features
    out_pointer,  # [tokens, 4 D]: dq and dk are written; without LRPE it may equal gradient_pointer
    flow_pointer,  # [programs along tokens, D] fp32, written: the near part of dtheta; None: not wanted
    largest_pointer,  # of dq and dk; None: not noted
    x_row,
    gradient_row,
    out_row,
    tokens,
    total,
    positions_row,
    positions_time,
    width,
    head_width,
    stretch,  # THETA_STRETCH
    middle,  # middle_of_first(total)
    ACT: tl.constexpr,
    QUICK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    dtype = out_pointer.dtype.element_ty
    if theta_pointer is not None:
        fraction = turn_fraction(tl.load(theta_pointer + column, mask=column < width, other=0.0))
    if flow_pointer is not None:
        flow = tl.zeros([COLUMNS], dtype=tl.float32)
    if largest_pointer is not None:
        most = tl.zeros([COLUMNS], dtype=tl.int32)
    for step in range(STEPS):
        token = (tl.program_id(0) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        held = token < tokens
        mask = held[:, None] & (column < width)[None, :]
        x_at = x_pointer + token.to(tl.int64)[:, None] * x_row + column[None, :]
        q = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
        k = tl.load(x_at + width, mask=mask, other=0.0).to(tl.float32)
        from_row = gradient_pointer + token.to(tl.int64)[:, None] * gradient_row
        if theta_pointer is not None:
            position = positions_of(token, total, positions_pointer, positions_row, positions_time, held)
            cos, sin = cos_sin(position, fraction, QUICK)
            at = from_row + (column + (column // head_width) * head_width)[None, :]
            dq_cos = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            dq_sin = tl.load(at + head_width, mask=mask, other=0.0).to(tl.float32)
            dk_cos = tl.load(at + 2 * width, mask=mask, other=0.0).to(tl.float32)
            dk_sin = tl.load(at + 2 * width + head_width, mask=mask, other=0.0).to(tl.float32)
            if flow_pointer is not None:
                terms = activate(q, ACT, QUICK) * (dq_sin * cos - dq_cos * sin)
                terms += activate(k, ACT, QUICK) * (dk_sin * cos - dk_cos * sin)
                place = token % total
                if weight_pointer is not None:
                    weight = tl.load(weight_pointer + place, mask=held, other=0.0)
                else:
                    weight = (place % stretch).to(tl.float32) - middle
                flow += tl.sum(tl.where(mask, terms * weight[:, None], 0.0), axis=0)
            dq = dq_cos * cos + dq_sin * sin
            dk = dk_cos * cos + dk_sin * sin
        else:
            dq = tl.load(from_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
            dk = tl.load(from_row + width + column[None, :], mask=mask, other=0.0).to(tl.float32)
        to = out_pointer + token.to(tl.int64)[:, None] * out_row + column[None, :]
        dq = (dq * slope(q, ACT, QUICK)).to(dtype)
        dk = (dk * slope(k, ACT, QUICK)).to(dtype)
        tl.store(to, dq, mask=mask)
        tl.store(to + width, dk, mask=mask)
        if largest_pointer is not None:
            most = tl.maximum(most, tl.max(tl.maximum(magnitude_bits(dq), magnitude_bits(dk)), axis=0))
    if largest_pointer is not None:
        tl.atomic_max(largest_pointer + tl.program_id(0) % SLOTS, tl.max(most, axis=0), sem="relaxed")
    if flow_pointer is not None:
        at = tl.program_id(0).to(tl.int64) * width + column
        tl.store(flow_pointer + at, flow, mask=column < width)
