"""The Triton tile of the head's product, per architecture: pinned, so that all ranks and runs agree."""

from dataclasses import dataclass


@dataclass(frozen=True)
class HeadTile:
    """tokens x vocabulary: the logits a program forms at a time, `depth` of the width at a time. warps, stages:
    Triton's. persistent: a program for each multiprocessor forms one tile after the other, and loads the next one's
    inputs while it takes exponentials of this one's logits; otherwise a program forms one tile."""

    tokens: int
    vocabulary: int
    depth: int
    warps: int
    stages: int
    persistent: bool = False


# Compute capability, major: 8 is the A100 (163 KiB of shared memory a program), 9 the H100 and H200 (227 KiB).
TILES = {8: HeadTile(128, 128, 32, 8, 3), 9: HeadTile(128, 256, 64, 8, 3, persistent=True)}
