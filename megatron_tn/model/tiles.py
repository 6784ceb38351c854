"""Normal initial values of a matrix, as a function of seed, matrix name and element index: equal for any sharding.

A matrix is a grid of TILE x TILE tiles, each drawn from its own random generator. A rank draws the tiles that overlap
its part, one at a time, so it never holds the whole matrix.
"""

import hashlib

import torch
from torch import Tensor

from megatron_tn.parallel.sharding import Box

TILE = 256  # rows and columns of a tile; changing it changes all initial values


def normal_box(name: str, shape: tuple[int, ...], box: Box, std: float, seed: int) -> Tensor:
    """Values N(0, std) within `box` of the matrix `name` of `shape`, fp32 on the CPU."""
    (top, bottom), (left, right) = box
    value = torch.empty(bottom - top, right - left, device="cpu")
    if value.numel() == 0:
        return value
    for row in range(top - top % TILE, bottom, TILE):
        for column in range(left - left % TILE, right, TILE):
            tile = _tile(name, row, column, shape, std, seed)
            first, last = max(row, top), min(row + TILE, bottom)
            begin, end = max(column, left), min(column + TILE, right)
            value[first - top : last - top, begin - left : end - left] = tile[
                first - row : last - row, begin - column : end - column
            ]
    return value


def _tile(name: str, row: int, column: int, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{name}/{row}/{column}".encode()).digest()
    generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    size = (min(TILE, shape[0] - row), min(TILE, shape[1] - column))
    return torch.empty(size, device="cpu").normal_(0.0, std, generator=generator)
