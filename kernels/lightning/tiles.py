"""Triton tile sizes by architecture, input type and width, fixed so that all ranks and runs agree bitwise."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Tile:
    """The sizes of one program of the scan (triton_scan.py).

    chunk: positions of one step of the scan's loop.
    out: columns of the output, and of the state, that a program owns.
    warps, stages: Triton's num_warps and num_stages.
    programs: concurrent programs on the architecture; determines the number of segments of a long sequence
        (sequences.py). A constant, not read from the GPU, so that H100, H200 and their smaller variants agree bitwise.
    """

    chunk: int
    out: int
    warps: int
    stages: int
    programs: int


# Key: the summed width, rounded up to a power of two. A program keeps its slice of the state, fp32 [out, summed width],
# in registers; tiles of `stages` chunks are in shared memory.
# On Hopper a slice of 128 columns and eight warps give each of the two warp groups 64 rows, the full height of a
# tensor-core instruction.
_HOPPER_HALF = {
    16: Tile(64, 128, 8, 3, 132),
    32: Tile(64, 128, 8, 3, 132),
    64: Tile(64, 128, 8, 3, 132),
    128: Tile(64, 128, 8, 3, 132),
    256: Tile(32, 128, 8, 3, 132),
}
# Eight warps at 128 and 256: with four, packed documents with initial states would spill registers.
_AMPERE_HALF = {
    16: Tile(32, 64, 4, 2, 216),
    32: Tile(32, 64, 4, 2, 216),
    64: Tile(32, 64, 4, 2, 216),
    128: Tile(32, 64, 8, 2, 216),
    256: Tile(32, 32, 8, 2, 216),
}
# Tensor cores have no full-precision fp32 product, so fp32 products run on the CUDA cores, with small tiles.
_SINGLE = {
    16: Tile(32, 16, 4, 1, 216),
    32: Tile(32, 16, 4, 1, 216),
    64: Tile(32, 16, 8, 1, 216),
    128: Tile(16, 32, 8, 1, 216),
    256: Tile(32, 16, 8, 1, 216),
}

# Major compute capability -> bytes of an input element -> summed width -> tile. 8 is the A100 (163 KiB of shared memory
# a program), 9 the H100 and H200 (227 KiB).
TILES = {8: {2: _AMPERE_HALF, 4: _SINGLE}, 9: {2: _HOPPER_HALF, 4: _SINGLE}}

# Positions per stretch of dtheta (kernels/gla/theta_gradient.py), a multiple of every tile's chunk. dtheta's rounding
# error grows with this length; one state per stretch is written and read.
THETA_STRETCH = 512


def tile_for(capability: int, element_bytes: int, summed_width: int, out_width: int) -> Tile:
    """The tile for inputs of `element_bytes`; both widths are powers of two of at least 16.

    capability: major compute capability; newer ones than the table's newest use its row. Raises ValueError for one
    older than the table's oldest.
    """
    if capability < min(TILES):
        raise ValueError(f"capability={capability}.x is older than the oldest with tiles, {min(TILES)}.x (Ampere)")
    tile = TILES[min(capability, max(TILES))][element_bytes][summed_width]
    if out_width >= tile.out:
        return tile
    # A narrower output has too few rows for two warp groups, which would compute the same rows twice.
    return replace(tile, out=out_width, warps=min(tile.warps, 4))


def padded(width: int) -> int:
    """The width as kernels hold it: the next power of two, at least 16."""
    return max(16, 1 << (width - 1).bit_length())
