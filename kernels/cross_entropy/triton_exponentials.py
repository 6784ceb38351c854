"""The output head's product in Triton: logits stay in registers, and only their exponentials are written.

A program owns a tile of tokens x vocabulary. It sums the logits in fp32 and stores exp(logit - reference) in the
inputs' type, with each token's sum of exponentials before rounding. bf16 has the range of fp32, so the reference may
lie up to 60 nats below the token's highest logit. The reference is the target's logit, computed beforehand. Where the
highest logit exceeds it by more than 60 nats (so the loss is above 60), repair_kernel recomputes the tile.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def reference_kernel(
    hidden_pointer,  # [n, D]
    weight_pointer,  # [V, D]
    target_row_pointer,  # [n] int64: the target's row of the weight, -1 where another rank has it or there is no target
    reference_pointer,  # [n] fp32: the target row's logit; row 0's for -1
    target_logit_pointer,  # [n] fp32: the target row's logit; 0 for -1
    depth,
    hidden_row,
    weight_row,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(target_row_pointer + token)
    hidden = hidden_pointer + token * hidden_row
    weight = weight_pointer + tl.maximum(row, 0) * weight_row
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, depth, BLOCK):
        at = start + tl.arange(0, BLOCK)
        h = tl.load(hidden + at, mask=at < depth, other=0.0).to(tl.float32)
        w = tl.load(weight + at, mask=at < depth, other=0.0).to(tl.float32)
        total += h * w
    logit = tl.sum(total, 0)
    tl.store(reference_pointer + token, logit)
    tl.store(target_logit_pointer + token, tl.where(row >= 0, logit, 0.0))


@triton.jit
def form_tile(
    hidden,  # [n, D]; hidden, weight and out: TMA descriptors, or pointers
    weight,  # [V, D]
    out,  # [n, V]
    first_token,
    first_column,
    reference,  # [BLOCK_T] fp32
    tokens,
    columns,  # rows of the weight before the padding, whose logits are -inf
    width,  # V
    depth,  # D
    hidden_row,
    weight_row,
    out_row,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Store exp(hidden weight^T - reference) of one tile; return its tokens' highest logits and sums of exponentials,
    [BLOCK_T] fp32 each."""
    token = first_token + tl.arange(0, BLOCK_T)
    column = first_column + tl.arange(0, BLOCK_V)
    logits = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    for start in range(0, depth, BLOCK_D):
        if DESCRIPTORS:
            h = hidden.load([first_token, start])
            w = weight.load([first_column, start])
        else:
            at = start + tl.arange(0, BLOCK_D)
            h = tl.load(
                hidden + token.to(tl.int64)[:, None] * hidden_row + at[None, :],
                mask=(token < tokens)[:, None] & (at[None, :] < depth),
                other=0.0,
            )
            w = tl.load(
                weight + column.to(tl.int64)[:, None] * weight_row + at[None, :],
                mask=(column[:, None] < width) & (at[None, :] < depth),
                other=0.0,
            )
        logits = tl.dot(h, w.T, logits, input_precision="ieee")

    logits = tl.where((column < columns)[None, :], logits, float("-inf"))
    highest = tl.max(logits, 1)
    exponentials = tl.exp2((logits - reference[:, None]) * LOG2_E)
    if DESCRIPTORS:
        out.store([first_token, first_column], exponentials.to(out.dtype))
    else:
        mask = (token < tokens)[:, None] & (column[None, :] < width)
        at_out = out + token.to(tl.int64)[:, None] * out_row + column[None, :]
        tl.store(at_out, exponentials.to(out.dtype.element_ty), mask=mask)
    return highest, tl.sum(exponentials, 1)


@triton.jit
def exponentials_kernel(
    hidden,  # [n, D]; the first arguments are form_tile's
    weight,
    out,
    reference_pointer,  # [n] fp32
    highest_pointer,  # [tiles, n] fp32: the highest logit in each tile of the vocabulary
    sums_pointer,  # [tiles, n] fp32: the sum of exponentials in each tile
    tokens,
    columns,
    width,  # V
    depth,  # D
    hidden_row,
    weight_row,
    out_row,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    PERSISTENT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    # Token tiles vary fastest, so that concurrent programs read the same few weight tiles from the L2 cache.
    token_tiles = tl.cdiv(tokens, BLOCK_T)
    tiles = token_tiles * tl.cdiv(width, BLOCK_V)
    # flatten merges this loop with the product's loop, so that the next tile's loads begin before this tile is done.
    for number in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES, flatten=PERSISTENT):
        tile = number // token_tiles
        first_token = (number % token_tiles) * BLOCK_T
        token = first_token + tl.arange(0, BLOCK_T)
        reference = tl.load(reference_pointer + token, mask=token < tokens, other=0.0)
        highest, sums = form_tile(
            hidden,
            weight,
            out,
            first_token,
            tile * BLOCK_V,
            reference,
            tokens,
            columns,
            width,
            depth,
            hidden_row,
            weight_row,
            out_row,
            BLOCK_T,
            BLOCK_V,
            BLOCK_D,
            DESCRIPTORS,
        )
        at_tile = tile.to(tl.int64) * tokens + token
        tl.store(highest_pointer + at_tile, highest, mask=token < tokens)
        tl.store(sums_pointer + at_tile, sums, mask=token < tokens)


@triton.jit
def repair_kernel(
    hidden,
    weight,
    out,
    reference_pointer,
    highest_pointer,  # [n] fp32: the highest logit over the vocabulary of all ranks
    sums_pointer,  # [tiles, n] fp32: written for recomputed tiles
    tokens,
    columns,
    width,
    depth,
    hidden_row,
    weight_row,
    out_row,
    limit,  # largest highest - reference without recomputation, in nats
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Recompute the tiles that have a token with highest > reference + limit, with `highest` as that token's
    reference."""
    token_tiles = tl.cdiv(tokens, BLOCK_T)
    first_token = (tl.program_id(0) % token_tiles) * BLOCK_T
    tile = tl.program_id(0) // token_tiles
    token = first_token + tl.arange(0, BLOCK_T)
    reference = tl.load(reference_pointer + token, mask=token < tokens, other=0.0)
    highest = tl.load(highest_pointer + token, mask=token < tokens, other=0.0)
    stale = highest - reference > limit
    if tl.sum(stale.to(tl.int32), 0) == 0:
        return
    _, sums = form_tile(
        hidden,
        weight,
        out,
        first_token,
        tile * BLOCK_V,
        tl.where(stale, highest, reference),
        tokens,
        columns,
        width,
        depth,
        hidden_row,
        weight_row,
        out_row,
        BLOCK_T,
        BLOCK_V,
        BLOCK_D,
        DESCRIPTORS,
    )
    tl.store(sums_pointer + tile.to(tl.int64) * tokens + token, sums, mask=token < tokens)


@triton.jit
def totals_kernel(
    sums_pointer,  # [n] fp32: exponentials_kernel's sums of exponentials
    repaired_pointer,  # [tiles, n] fp32: repair_kernel's sums of exponentials
    reference_pointer,  # [n] fp32
    highest_pointer,  # [n] fp32
    used_pointer,  # [n] fp32, written: the reference of the stored exponentials
    total_pointer,  # [n] fp32, written: the sum of exp(logit - highest)
    tokens,
    tiles,
    limit,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    held = token < tokens
    reference = tl.load(reference_pointer + token, mask=held, other=0.0)
    highest = tl.load(highest_pointer + token, mask=held, other=0.0)
    total = tl.load(sums_pointer + token, mask=held, other=0.0)
    stale = held & (highest - reference > limit)
    if tl.sum(stale.to(tl.int32), 0) > 0:
        parts = tl.zeros([BLOCK, BLOCK_T], tl.float32)
        for first in range(0, tiles, BLOCK):
            tile = first + tl.arange(0, BLOCK)
            at = repaired_pointer + tile.to(tl.int64)[:, None] * tokens + token[None, :]
            parts += tl.load(at, mask=stale[None, :] & (tile[:, None] < tiles), other=0.0)
        total = tl.where(stale, tl.sum(parts, 0), total)
    used = tl.where(stale, highest, reference)
    tl.store(used_pointer + token, used, mask=held)
    tl.store(total_pointer + token, total * tl.exp(used - highest), mask=held)
