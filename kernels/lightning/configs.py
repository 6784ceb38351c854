"""The Triton tile of every input type and width, per architecture: pinned, so that all ranks and runs agree."""

import functools
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Tile:
    """chunk: positions at a time. out: slice of the output's width a program owns. warps, stages: Triton's own.

    programs: how many such programs the architecture runs at once, which decides into how many segments a long
    sequence is cut. A constant of the table, not of the GPU at hand, so that H100, H200 and their smaller variants
    agree bit by bit.
    """

    chunk: int
    out: int
    warps: int
    stages: int
    programs: int


# (bytes of an input element, width summed over, rounded up to a power of two) -> tile.
# The state's slice, out x summed width in fp32, stays in registers; the tiles of a chunk pass through shared memory,
# `stages` of them at a time. fp32 has no tensor-core product of full precision, and wants small tiles.
# On Hopper a slice of 128 with eight warps gives both of a program's warp groups a full 64 rows of the tensor core.
_HOPPER_HALF = {
    16: Tile(64, 128, 8, 3, 132),
    32: Tile(64, 128, 8, 3, 132),
    64: Tile(64, 128, 8, 3, 132),
    128: Tile(64, 128, 8, 3, 132),
    256: Tile(32, 128, 8, 3, 132),
}
# With four warps the larger slices would not quite fit the registers where documents have states.
_AMPERE_HALF = {
    16: Tile(32, 64, 4, 2, 216),
    32: Tile(32, 64, 4, 2, 216),
    64: Tile(32, 64, 4, 2, 216),
    128: Tile(32, 64, 8, 2, 216),
    256: Tile(32, 32, 8, 2, 216),
}
_SINGLE = {
    16: Tile(32, 16, 4, 1, 216),
    32: Tile(32, 16, 4, 1, 216),
    64: Tile(32, 16, 8, 1, 216),
    128: Tile(16, 32, 8, 1, 216),
    256: Tile(32, 16, 8, 1, 216),
}

# Compute capability, major: 8 is the A100 (163 KiB of shared memory a program), 9 the H100 and H200 (227 KiB).
TILES = {8: {2: _AMPERE_HALF, 4: _SINGLE}, 9: {2: _HOPPER_HALF, 4: _SINGLE}}

# Positions between which theta's gradient counts from the middle, a multiple of every tile's chunk. Its rounding error
# grows with this; states of this spacing are written and read once.
THETA_STRETCH = 512

# The cost of a segment beyond its scan, in positions of a scan: starting a program, and the states' own pass, which
# reads two tensors for a scan's four, and of fast heads only what has not faded. Chosen from measured times.
_COST_OF_START = 256
_COST_OF_STATES = 0.4
_SHORTEST_SEGMENT = 1024
_GRAIN = 128  # a multiple of every tile's chunk


def tile_for(capability: int, element_bytes: int, summed_width: int, out_width: int) -> Tile:
    """The tile for inputs of `element_bytes`, both widths being powers of two of at least 16.

    capability: the major compute capability; newer architectures than the table's take its newest row. Raises
    ValueError for one that is older.
    """
    if capability < min(TILES):
        raise ValueError(f"capability={capability}.x is older than the oldest with tiles, {min(TILES)}.x (Ampere)")
    tile = TILES[min(capability, max(TILES))][element_bytes][summed_width]
    if out_width >= tile.out:
        return tile
    # Fewer rows than two warp groups would both compute the same ones.
    return replace(tile, out=out_width, warps=min(tile.warps, 4))


@functools.cache
def segment_length(tile: Tile, programs: int, length: int) -> int:
    """Positions a segment for `programs` programs over sequences of `length`: `length` itself for no split.

    The least time of the scan's rounds, `tile.programs` programs each, with the pass for the segments' states.
    """
    best, least = length, float(-(-programs // tile.programs) * (length + _COST_OF_START))
    for segments in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64):
        segment = -(-length // (segments * _GRAIN)) * _GRAIN
        rounds = -(-programs * segments // tile.programs)
        state_rounds = max(1.0, 0.5 * programs * (segments - 1) / tile.programs)
        cost = rounds * (segment + _COST_OF_START) + _COST_OF_STATES * segment * state_rounds
        if segment >= _SHORTEST_SEGMENT and cost < least:
            best, least = segment, cost
    return best


def padded(width: int) -> int:
    """The width as kernels hold it: the next power of two, at least 16."""
    return max(16, 1 << (width - 1).bit_length())


def plan_segment(capability: int, element_bytes: int, rows: int, total: int, heads: int, key: int, value: int) -> int:
    """Positions a segment for `rows` rows of `total` positions and q, v of these widths, for all scans of a call."""
    tile = tile_for(capability, element_bytes, padded(key), padded(value))
    return segment_length(tile, rows * heads * -(-value // tile.out), total)
