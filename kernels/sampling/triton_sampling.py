"""Sampling in one kernel: a program owns a row of logits, and reads it again for each pass over the vocabulary.

A row of 64000 bf16 logits stays in the multiprocessor's L1 cache. The kth largest logit is found by bisection over
its bit pattern, two bits a pass: at most 8 passes for bf16, 16 for fp32. For k <= GROUPS it is at least the least of
GROUPS groups' largest logits; passes over bits above the distance from there to the largest logit are left out, about
half of them. So is the least logit of the nucleus found, by the weights of the tokens above a threshold. Then the token
is drawn by inverting the cumulative weights in the order of ids.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 4096, 16
GROUPS = tl.constexpr(64)  # of a row's columns
UNROLL = 4  # blocks of a pass whose loads are in flight together
GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
FIRST_MULTIPLIER = tl.constexpr(0xBF58476D1CE4E5B9)
SECOND_MULTIPLIER = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def uniform(key, position):
    """`kernels.sampling.uniform.uniform` of one row, fp32: the upper 24 bits."""
    z = key.to(tl.uint64, bitcast=True) + position.to(tl.uint64, bitcast=True) * GAMMA
    z = (z ^ (z >> 30)) * FIRST_MULTIPLIER
    z = (z ^ (z >> 27)) * SECOND_MULTIPLIER
    z = z ^ (z >> 31)
    return (z >> 40).to(tl.float32) * 5.9604644775390625e-08  # 2^-24


@triton.jit
def load_logits(logits_at, seen_at, column, size, penalty, PENALTY: tl.constexpr):
    """fp32 logits of the columns, -inf past the vocabulary, after the repetition penalty."""
    x = tl.load(logits_at + column, mask=column < size, other=float("-inf")).to(tl.float32)
    if PENALTY:
        seen = tl.load(seen_at + column, mask=column < size, other=0) != 0
        x = tl.where(seen, tl.where(x > 0, x / penalty, x * penalty), x)
    return x


@triton.jit
def in_order(place):
    """The fp32 number at a uint32 place of their order, by bit patterns; -inf for the places before that of -inf, which
    belong to NaN."""
    flipped = (place ^ 0x80000000).to(tl.int32, bitcast=True)
    x = (flipped ^ ((flipped >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return tl.where(place < 0x007FFFFF, float("-inf"), x)


@triton.jit
def place_of(x):
    """The place of an fp32 number in the order of `in_order`, uint32."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def beyond(place, more):
    """The number that many places on; NaN, which no logit reaches, where the order ends before."""
    return in_order(tl.where(place > 0xFFFFFFFF - more, 0xFFFFFFFF, place + more))


@triton.jit
def sample_kernel(
    logits_pointer,  # [B, V]
    seen_pointer,  # [B, V] bool, or None: no penalty
    temperature_pointer,  # [B] fp64
    top_k_pointer,  # [B] int64
    top_p_pointer,  # [B] fp64
    penalty_pointer,  # [B] fp32
    keys_pointer,  # [B] int64
    positions_pointer,  # [B] int64
    chosen_pointer,  # [B] int64
    row_stride,
    size,  # V
    PENALTY: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_at = logits_pointer + row * row_stride
    seen_at = seen_pointer
    penalty = 1.0
    if PENALTY:
        seen_at += row * size
        penalty = tl.load(penalty_pointer + row)
    temperature = tl.load(temperature_pointer + row).to(tl.float32)
    top_k = tl.load(top_k_pointer + row)
    top_p = tl.load(top_p_pointer + row).to(tl.float32)
    offsets = tl.arange(0, BLOCK)

    # Each thread keeps the best of its columns; one reduction over threads follows.
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    where = offsets
    for first in tl.range(0, size, BLOCK, loop_unroll_factor=UNROLL):
        x = load_logits(logits_at, seen_at, first + offsets, size, penalty, PENALTY)
        where = tl.where(x > best, first + offsets, where)
        best = tl.maximum(x, best)
    largest = tl.max(best, 0)
    chosen = tl.min(tl.where(best == largest, where, 2147483647), 0)
    if temperature > 0:
        least = float("-inf")  # the least logit that is kept
        if (top_k > 0) & (top_k < size):
            place = tl.full([], 0, tl.uint32)  # place of the kth largest logit, found from its highest bits on
            if top_k <= GROUPS:
                floor = place_of(tl.min(tl.max(tl.reshape(best, (GROUPS, BLOCK // GROUPS)), 1), 0))
                place = (floor >> (32 - BITS)) << (32 - BITS)
            distance = place_of(largest) - place
            for step in range(BITS // 2):
                unit = tl.full([], 1, tl.uint32) << (30 - 2 * step)
                if distance >= unit:
                    first_bound, second_bound = beyond(place, unit), beyond(place, 2 * unit)
                    third_bound = beyond(place, 3 * unit)
                    # How many logits reach each bound, in three fields of one number: a thread's part is below 2^10.
                    counts = tl.zeros([BLOCK], tl.int32)
                    for first in tl.range(0, size, BLOCK, loop_unroll_factor=UNROLL):
                        x = load_logits(logits_at, seen_at, first + offsets, size, penalty, PENALTY)
                        counts += tl.where(x >= first_bound, 1, 0) + tl.where(x >= second_bound, 1 << 10, 0)
                        counts += tl.where(x >= third_bound, 1 << 20, 0)
                    wide = (counts & 0x3FF).to(tl.int64) + (((counts >> 10) & 0x3FF).to(tl.int64) << 21)
                    total_counts = tl.sum(wide + ((counts >> 20).to(tl.int64) << 42), 0)
                    reached = ((total_counts & 0x1FFFFF) >= top_k).to(tl.uint32)
                    reached += (((total_counts >> 21) & 0x1FFFFF) >= top_k).to(tl.uint32)
                    reached += ((total_counts >> 42) >= top_k).to(tl.uint32)
                    place += reached * unit
            least = in_order(place)
        total = kept_weight(logits_at, seen_at, size, penalty, largest, temperature, least, PENALTY, BLOCK, UNROLL)
        if top_p < 1:
            mass = top_p * total
            place = tl.full([], 0, tl.uint32)
            for step in range(BITS // 2):
                unit = tl.full([], 1, tl.uint32) << (30 - 2 * step)
                first_bound, second_bound = in_order(place + unit), in_order(place + 2 * unit)
                third_bound = in_order(place + 3 * unit)
                first_sums = tl.zeros([BLOCK], tl.float32)
                second_sums = tl.zeros([BLOCK], tl.float32)
                third_sums = tl.zeros([BLOCK], tl.float32)
                for first in tl.range(0, size, BLOCK, loop_unroll_factor=UNROLL):
                    x = load_logits(logits_at, seen_at, first + offsets, size, penalty, PENALTY)
                    weight = tl.where(x >= least, tl.exp((x - largest) / temperature), 0.0)
                    first_sums += tl.where(x >= first_bound, weight, 0.0)
                    second_sums += tl.where(x >= second_bound, weight, 0.0)
                    third_sums += tl.where(x >= third_bound, weight, 0.0)
                reached = (tl.sum(first_sums, 0) >= mass).to(tl.uint32)
                reached += (tl.sum(second_sums, 0) >= mass).to(tl.uint32)
                reached += (tl.sum(third_sums, 0) >= mass).to(tl.uint32)
                place += reached * unit
            # Rounding may leave `mass` above the largest token's weight alone; that token always stays.
            least = tl.maximum(least, tl.minimum(in_order(place), largest))
            total = kept_weight(logits_at, seen_at, size, penalty, largest, temperature, least, PENALTY, BLOCK, UNROLL)
        drawn = uniform(tl.load(keys_pointer + row), tl.load(positions_pointer + row)) * total
        passed = 0.0
        found = tl.full([], -1, tl.int32)
        for first in range(0, size, BLOCK):
            if found < 0:
                column = first + offsets
                x = load_logits(logits_at, seen_at, column, size, penalty, PENALTY)
                kept = (x >= least) & (column < size)
                weight = tl.where(kept, tl.exp((x - largest) / temperature), 0.0)
                here = tl.sum(weight, 0)
                if passed + here > drawn:
                    past = kept & (passed + tl.cumsum(weight, 0) > drawn)
                    found = tl.min(tl.where(past, column, 2147483647), 0)
                    if found == 2147483647:  # the scan's last sum is rounded below `here`: the last kept token
                        found = tl.max(tl.where(kept, column, 0), 0)
                passed += here
        chosen = tl.where(found < 0, chosen, found)  # `total` is rounded above the last sum: the likeliest token
    tl.store(chosen_pointer + row, chosen.to(tl.int64))
    if PENALTY:
        tl.store(seen_at + chosen, 1)


@triton.jit
def kept_weight(
    logits_at,
    seen_at,
    size,
    penalty,
    largest,
    temperature,
    least,
    PENALTY: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The sum of exp((logit - largest) / temperature) over the tokens that are kept."""
    offsets = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(0, size, BLOCK, loop_unroll_factor=UNROLL):
        x = load_logits(logits_at, seen_at, first + offsets, size, penalty, PENALTY)
        sums += tl.where(x >= least, tl.exp((x - largest) / temperature), 0.0)
    return tl.sum(sums, 0)


def sample(
    *,
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    keys: Tensor,
    positions: Tensor,
    penalty: Tensor | None,
    seen: Tensor | None,
) -> Tensor:
    """See `sample_tokens` in op.py."""
    rows, size = logits.shape
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    chosen = torch.empty(rows, dtype=torch.int64, device=logits.device)
    with torch.cuda.device_of(logits):
        sample_kernel[(rows,)](
            logits_pointer=logits,
            seen_pointer=None if seen is None else seen.view(torch.uint8),
            temperature_pointer=temperature,
            top_k_pointer=top_k,
            top_p_pointer=top_p,
            penalty_pointer=penalty,
            keys_pointer=keys,
            positions_pointer=positions,
            chosen_pointer=chosen,
            row_stride=logits.stride(0),
            size=size,
            PENALTY=seen is not None,
            BITS=16 if logits.dtype == torch.bfloat16 and seen is None else 32,
            BLOCK=BLOCK,
            UNROLL=UNROLL,
            num_warps=WARPS,
        )
    return chosen
