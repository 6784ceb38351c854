"""`python -m kernels.bench.tune`: times candidate tiles of lightning attention on this GPU, forward + backward.

It only prints. The table in kernels/lightning/tiles.py is edited by hand, so that a tile changes in a commit, for all
ranks and runs at once.
"""

import itertools
import sys

import torch

import kernels
from kernels.bench.measure import milliseconds
from kernels.lightning.tiles import TILES, Tile

CHUNKS, SLICES, STAGES = (32, 64, 128), (32, 64, 128), (2, 3, 4)
WIDTHS = (64, 128, 256)  # widths of q and k to tune; narrower heads are rare


def candidates(pinned: Tile) -> list[Tile]:
    """`pinned`, and the alternatives to time. Eight warps only where both warp groups have rows to compute."""
    tiles = [pinned]
    for chunk, out, stages in itertools.product(CHUNKS, SLICES, STAGES):
        tile = Tile(chunk, out, 8 if out >= 128 else 4, stages, pinned.programs)
        if tile != pinned:
            tiles.append(tile)
    return tiles


def tune(width: int, device: torch.device, time=milliseconds) -> list[tuple[float, Tile]]:
    """(milliseconds, tile) of the candidates that compile and run, fastest first: 32 rows of 1024 positions, 32 heads,
    q and k of `width`, v of at most 128."""
    row = TILES[min(torch.cuda.get_device_capability(device)[0], max(TILES))][2]
    q, k, do, v = (
        torch.randn(32, 1024, 32, size, dtype=torch.bfloat16, device=device).requires_grad_()
        for size in (width, width, min(width, 128), min(width, 128))
    )
    decay = torch.logspace(-8, 0, 32, base=2, device=device)

    def both():
        o = kernels.lightning_attention(q, k, v, decay)
        return torch.autograd.grad(o, (q, k, v), do.detach())

    pinned, results = row[width], []
    try:
        for tile in candidates(pinned):
            row[width] = tile
            try:
                results.append((time(both, device), tile))
            except Exception as error:  # too large a tile raises various compiler and driver errors
                print(f"width {width}: {tile} does not run: {str(error).splitlines()[0][:80]}")
    finally:
        row[width] = pinned
    return sorted(results, key=lambda result: result[0])


def main() -> int:
    if not torch.cuda.is_available():
        print("tuning needs a CUDA device")
        return 1
    device = torch.device("cuda")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for width in WIDTHS:
        pinned = TILES[min(torch.cuda.get_device_capability()[0], max(TILES))][2][width]
        for time, tile in tune(width, device)[:5]:
            print(f"width {width}: {time:.3f} ms  {tile}{'  (pinned)' if tile == pinned else ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
