"""The output head in Triton: a product whose logits never reach memory, only their exponentials, already rounded.

A program owns a tile of tokens x vocabulary. The logits are summed in fp32, and exp(logit - reference) is what it
stores, in the inputs' type, along with each row's sum before rounding. bf16 has the range of fp32, so the reference
need only lie within 60 nats of the row's highest logit. The target's own logit, known beforehand, does so unless the
token's loss is above 60; rows where it does not are done again from their highest.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.cross_entropy.tiles import TILES, HeadTile

SCALE_BLOCK = 2048
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def reference_kernel(
    hidden_pointer,  # [n, D]
    weight_pointer,  # [V, D]
    rows_pointer,  # [n] int64: the target's row, -1 where it is another rank's or there is none
    reference_pointer,  # [n] fp32: the logit of that row, or of row 0
    picked_pointer,  # [n] fp32: the same, or 0
    depth,
    hidden_row,
    weight_row,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_pointer + token)
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
    tl.store(picked_pointer + token, tl.where(row >= 0, logit, 0.0))


@triton.jit
def form_tile(
    hidden,  # [n, D]: descriptors, or pointers
    weight,  # [V, D]
    out,  # [n, V]
    first_token,
    first_column,
    reference,  # [BLOCK_T] fp32
    tokens,
    columns,  # rows of the weight that count; those beyond are padding
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
    """Store a tile's exponentials; its rows' highest logits and sums, [BLOCK_T] fp32."""
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
    hidden,  # [n, D]: descriptors, or pointers
    weight,  # [V, D]
    out,  # [n, V]
    reference_pointer,  # [n] fp32
    highest_pointer,  # [tiles, n] fp32: the highest logit of each tile
    sums_pointer,  # [tiles, n] fp32
    tokens,
    columns,  # rows of the weight that count; those beyond are padding
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
    # Tokens first: the tiles of one wave share a few of the weight, which is larger than the L2.
    token_tiles = tl.cdiv(tokens, BLOCK_T)
    tiles = token_tiles * tl.cdiv(width, BLOCK_V)
    # As one loop with the product's: its loads run ahead across the border between two tiles.
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
    highest_pointer,  # [n] fp32: the highest logits, of all ranks
    sums_pointer,  # [tiles, n] fp32: written where a row of the tile is done again
    tokens,
    columns,
    width,
    depth,
    hidden_row,
    weight_row,
    out_row,
    limit,  # how far a logit may lie above the reference
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Do the tiles again in which a row's highest logit lies more than `limit` above its reference."""
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
    sums_pointer,  # [n] fp32: of the exponentials as first made
    repaired_pointer,  # [tiles, n] fp32: of those made again, tile by tile
    reference_pointer,  # [n] fp32
    highest_pointer,  # [n] fp32
    used_pointer,  # [n] fp32: the reference that the exponentials now have
    total_pointer,  # [n] fp32: sum of exp(logit - highest)
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


@triton.jit
def gradient_kernel(
    exponentials_pointer,  # [n, V]
    hidden_pointer,  # [n, D]
    scaled_pointer,  # [n, D], contiguous
    scale_pointer,  # [n] fp32
    rows_pointer,  # [n] int64
    kept_pointer,  # [n] bool: whether the token has a loss
    reference_pointer,  # [n] fp32
    normalizer_pointer,  # [n] fp32: log of the sum of exp(logit)
    picked_pointer,  # [n] fp32: the target's logit
    depth,
    exponentials_row,
    hidden_row,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_pointer + token)
    reference = tl.load(reference_pointer + token)
    normalizer = tl.load(normalizer_pointer + token)
    picked = tl.load(picked_pointer + token)
    scale = tl.where(tl.load(kept_pointer + token), tl.exp(reference - normalizer), 0.0)
    tl.store(scale_pointer + token, scale)
    target = tl.exp(picked - reference) - tl.exp(normalizer - reference)
    at_target = exponentials_pointer + token * exponentials_row + tl.maximum(row, 0)
    tl.store(at_target, target.to(exponentials_pointer.dtype.element_ty), mask=row >= 0)
    for start in range(0, depth, BLOCK):
        at = start + tl.arange(0, BLOCK)
        h = tl.load(hidden_pointer + token * hidden_row + at, mask=at < depth, other=0.0).to(tl.float32)
        tl.store(scaled_pointer + token * depth + at, (h * scale).to(scaled_pointer.dtype.element_ty), mask=at < depth)


@triton.jit
def scale_kernel(
    x_pointer,  # [n, D], contiguous
    out_pointer,  # [n, D], contiguous
    factor_pointer,  # one fp32
    scales_pointer,  # [n] fp32
    depth,
    HAS_SCALES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(depth, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(factor_pointer)
    if HAS_SCALES:
        factor *= tl.load(scales_pointer + row)
    x = tl.load(x_pointer + row * depth + at, mask=at < depth, other=0.0).to(tl.float32)
    tl.store(out_pointer + row * depth + at, (x * factor).to(out_pointer.dtype.element_ty), mask=at < depth)


def exponentials(
    hidden: Tensor, weight: Tensor, rows: Tensor, columns: int, tile: HeadTile | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `head_exponentials` in pieces.py. tile: other than the pinned one, for tuning."""
    tokens, depth = hidden.shape
    width = weight.shape[0]
    tile = tile or _tile(hidden)
    tiles = triton.cdiv(width, tile.vocabulary)

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=hidden.device)

    out = torch.empty(tokens, width, dtype=hidden.dtype, device=hidden.device)
    reference, picked, highest, sums = new(tokens), new(tokens), new(tiles, tokens), new(tiles, tokens)
    with torch.cuda.device_of(hidden):
        reference_kernel[(tokens,)](
            hidden, weight, rows, reference, picked, depth, hidden.stride(0), weight.stride(0), BLOCK=1024, num_warps=4
        )
        if columns == 0:  # row 0 is padding, whose logit may lie above those that count: totals_ replaces this one
            reference.fill_(torch.finfo(reference.dtype).min)
        arguments, constants = _product_arguments(hidden, weight, out, reference, highest, sums, columns, tile)
        programs = triton.cdiv(tokens, tile.tokens) * tiles
        if tile.persistent:
            programs = min(programs, _multiprocessors(hidden))
        exponentials_kernel[(programs,)](*arguments, STAGES=tile.stages, PERSISTENT=tile.persistent, **constants)
    return out, reference, picked, highest.amax(0), sums.sum(0)


def totals_(
    out: Tensor,
    sums: Tensor,
    reference: Tensor,
    hidden: Tensor,
    weight: Tensor,
    highest: Tensor,
    columns: int,
    limit: float,
) -> tuple[Tensor, Tensor]:
    """See `head_totals_` in pieces.py."""
    tokens, tile = hidden.shape[0], _tile(hidden)
    tiles = triton.cdiv(weight.shape[0], tile.vocabulary)
    used, total = torch.empty_like(reference), torch.empty_like(reference)
    repaired = torch.empty(tiles, tokens, dtype=torch.float32, device=hidden.device)
    with torch.cuda.device_of(hidden):
        arguments, constants = _product_arguments(hidden, weight, out, reference, highest, repaired, columns, tile)
        repair_kernel[(triton.cdiv(tokens, tile.tokens) * tiles,)](*arguments, limit, **constants)
        totals_kernel[(triton.cdiv(tokens, 32),)](
            sums, repaired, reference, highest, used, total, tokens, tiles, limit, BLOCK_T=32, BLOCK=64, num_warps=4
        )
    return used, total


def gradient_(
    out: Tensor,
    scaled: Tensor,
    hidden: Tensor,
    rows: Tensor,
    kept: Tensor,
    reference: Tensor,
    normalizer: Tensor,
    picked: Tensor,
) -> Tensor:
    """See `head_gradient_` in pieces.py."""
    tokens, depth = hidden.shape
    scale = torch.empty(tokens, dtype=torch.float32, device=hidden.device)
    with torch.cuda.device_of(hidden):
        gradient_kernel[(tokens,)](
            out,
            hidden,
            scaled,
            scale,
            rows,
            kept,
            reference,
            normalizer,
            picked,
            depth,
            out.stride(0),
            hidden.stride(0),
            BLOCK=1024,
            num_warps=4,
        )
    return scale


def scaled(x: Tensor, factor: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See `head_scaled` in pieces.py."""
    rows, depth = x.shape
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    with torch.cuda.device_of(x):
        scale_kernel[(rows * triton.cdiv(depth, SCALE_BLOCK),)](
            x.contiguous(), out, factor, scales, depth, HAS_SCALES=scales is not None, BLOCK=SCALE_BLOCK, num_warps=4
        )
    return out


def _product_arguments(
    hidden: Tensor,
    weight: Tensor,
    out: Tensor,
    reference: Tensor,
    highest: Tensor,
    sums: Tensor,
    columns: int,
    tile: HeadTile,
) -> tuple[list, dict[str, int]]:
    """What both kernels that form tiles are given: arguments in order, and constants."""
    described = _capability(hidden) >= 9 and all(map(_describable, (hidden, weight, out)))
    arguments: list = [hidden, weight, out]
    if described:
        blocks = ((tile.tokens, tile.depth), (tile.vocabulary, tile.depth), (tile.tokens, tile.vocabulary))
        arguments = [TensorDescriptor.from_tensor(x, list(block)) for x, block in zip(arguments, blocks, strict=True)]
    tokens, depth = hidden.shape
    arguments += [reference, highest, sums, tokens, columns, weight.shape[0], depth]
    arguments += [x.stride(0) for x in (hidden, weight, out)]
    constants = {"BLOCK_T": tile.tokens, "BLOCK_V": tile.vocabulary, "BLOCK_D": tile.depth, "DESCRIPTORS": described}
    return arguments, constants | {"num_warps": tile.warps, "num_stages": tile.stages}


def _tile(x: Tensor) -> HeadTile:
    return TILES[min(_capability(x), max(TILES))]


def _capability(x: Tensor) -> int:
    return torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else max(TILES)


def _multiprocessors(x: Tensor) -> int:
    """Of the GPU; for the interpreter, so few that a program has several tiles, as there."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3


def _describable(x: Tensor) -> bool:
    """Whether bulk copies can read and write x [rows, width]: rows of whole, aligned 16 bytes."""
    return x.stride(1) == 1 and x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
