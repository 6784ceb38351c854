"""The Triton tile of every input type and width, per architecture: pinned, so that all ranks and runs agree."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """chunk: positions at a time. out: slice of the output's width a program owns. warps, stages: Triton's own."""

    chunk: int
    out: int
    warps: int
    stages: int


# (bytes of an input element, width summed over, rounded up to a power of two) -> tile.
# The state's slice, summed width x out in fp32, stays in registers; the tiles of a chunk pass through shared memory,
# `stages` of them at a time. fp32 has no tensor-core product of full precision, and wants small tiles.
_HALF = {
    16: Tile(64, 64, 4, 2),
    32: Tile(64, 64, 4, 2),
    64: Tile(64, 64, 8, 2),
    128: Tile(64, 64, 8, 2),
    256: Tile(64, 32, 8, 2),
}
_SINGLE = {
    16: Tile(32, 16, 4, 1),
    32: Tile(32, 16, 4, 1),
    64: Tile(32, 16, 8, 1),
    128: Tile(16, 32, 8, 1),
    256: Tile(16, 16, 8, 1),
}

# Compute capability, major: 8 is the A100 (163 KiB of shared memory a program), 9 the H100 and H200 (227 KiB).
TILES = {8: {2: _HALF, 4: _SINGLE}, 9: {2: _HALF, 4: _SINGLE}}


def tile_for(capability: int, element_bytes: int, summed_width: int, out_width: int) -> Tile:
    """The tile for inputs of `element_bytes`, both widths being powers of two of at least 16.

    capability: the major compute capability; newer architectures than the table's take its newest row. Raises
    ValueError for one that is older.
    """
    if capability < min(TILES):
        raise ValueError(f"capability={capability}.x is older than the oldest with tiles, {min(TILES)}.x (Ampere)")
    tile = TILES[min(capability, max(TILES))][element_bytes][summed_width]
    return tile if tile.out <= out_width else Tile(tile.chunk, out_width, tile.warps, tile.stages)
