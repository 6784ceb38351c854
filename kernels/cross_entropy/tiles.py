"""Triton tile sizes of the output head's product per architecture, fixed so that all ranks and runs agree bitwise."""

from dataclasses import dataclass


@dataclass(frozen=True)
class HeadTile:
    """The sizes of one program of the head's product (triton_exponentials.py).

    tokens, vocabulary: rows and columns of a tile of logits.
    depth: columns of the hidden state read in one step of the product's loop.
    warps, stages: Triton's num_warps and num_stages.
    persistent: one program per multiprocessor computes many tiles, and loads the next tile's operands during the
        current tile's exponentials; otherwise one program per tile.
    """

    tokens: int
    vocabulary: int
    depth: int
    warps: int
    stages: int
    persistent: bool = False


# Major compute capability -> tile: 8 is the A100 (163 KiB shared memory per program), 9 the H100 and H200 (227 KiB).
TILES = {8: HeadTile(128, 128, 32, 8, 3), 9: HeadTile(128, 256, 64, 8, 3, persistent=True)}
