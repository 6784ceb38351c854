"""The Triton tile of every input type and width, per architecture: pinned, so that all ranks and runs agree."""

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

HOPPER = 9  # major compute capability of the first architecture with bulk tensor copies


@dataclass(frozen=True)
class Tile:
    """The sizes of one program of the scan (triton_scan.py).

    chunk: positions of one step of the scan's loop.
    out: columns of the output, and of the state, that a program owns.
    warps, stages: Triton's num_warps and num_stages.
    programs: how many such programs the architecture runs at once; decides into how many segments a long sequence is
        cut (sequences.py). A constant of the table, not read from the GPU at hand, so that H100, H200 and their
        smaller variants compute the same bits.
    """

    chunk: int
    out: int
    warps: int
    stages: int
    programs: int


# Key: the width summed over, rounded up to a power of two. A program keeps its slice of the state, [out, summed width]
# in fp32, in registers; the tiles of a chunk pass through shared memory, `stages` chunks at a time.
# On Hopper a slice of 128 columns with eight warps gives each of a program's two warp groups 64 rows, the full height
# of a tensor-core instruction.
_HOPPER_HALF = {
    16: Tile(64, 128, 8, 3, 132),
    32: Tile(64, 128, 8, 3, 132),
    64: Tile(64, 128, 8, 3, 132),
    128: Tile(64, 128, 8, 3, 132),
    256: Tile(32, 128, 8, 3, 132),
}
# Eight warps at 128 and 256: with four, programs of packed documents with initial states would spill registers.
_AMPERE_HALF = {
    16: Tile(32, 64, 4, 2, 216),
    32: Tile(32, 64, 4, 2, 216),
    64: Tile(32, 64, 4, 2, 216),
    128: Tile(32, 64, 8, 2, 216),
    256: Tile(32, 32, 8, 2, 216),
}
# Tensor cores have no fp32 product of full precision, so the products run on the ordinary units, from small tiles.
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

# Positions of a stretch: theta's gradient counts positions from the middle of each (kernels/gla/theta_gradient.py). A
# multiple of every tile's chunk. Its rounding error grows with the length; one state per stretch is written and read.
THETA_STRETCH = 512


def tile_for(capability: int, element_bytes: int, summed_width: int, out_width: int) -> Tile:
    """The tile for inputs of `element_bytes`; both widths are powers of two of at least 16.

    capability: the major compute capability; one newer than the table's newest takes that row. Raises ValueError for
    one older than its oldest.
    """
    if capability < min(TILES):
        raise ValueError(f"capability={capability}.x is older than the oldest with tiles, {min(TILES)}.x (Ampere)")
    tile = TILES[min(capability, max(TILES))][element_bytes][summed_width]
    if out_width >= tile.out:
        return tile
    # A narrower output has too few rows for two groups of four warps: both would compute the same ones.
    return replace(tile, out=out_width, warps=min(tile.warps, 4))


def capability_of(x: Tensor) -> int:
    """The major compute capability of x's GPU; Hopper's for a CPU tensor, which Triton's interpreter runs."""
    return _device_capability(x.device) if x.is_cuda else HOPPER


@functools.cache
def _device_capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def padded(width: int) -> int:
    """The width as kernels hold it: the next power of two, at least 16."""
    return max(16, 1 << (width - 1).bit_length())
