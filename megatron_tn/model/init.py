"""Initial values, the same for every layout: an element depends on the seed, its parameter's released name and its
place in the logical tensor, and on nothing else.

A matrix is a grid of tiles, each drawn from a generator of its own. Whoever holds a part of it draws the tiles that the
part touches, one at a time, so that a rank makes about what it keeps and never holds a whole parameter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_tn.config import ModelConfig
from megatron_tn.model.transnormer import TransNormerLM
from megatron_tn.parallel.sharding import Box, ShardSpec

TILE = 256  # rows and columns drawn at a time. Part of the definition: another size gives other values.


def initial_box(name: str, shape: tuple[int, ...], box: Box, config: ModelConfig, seed: int) -> Tensor:
    """The values within `box` of the logical parameter `name` of `shape`, fp32 on the CPU.

    N(0, init_std) for matrices, with the pad row of the embedding zero; ones for norms; 10000^(-2j/D) for LRPE's theta
    (arXiv 2307.09270), j counted across heads, so that every head gets its own band of frequencies.
    """
    if name.endswith("norm.weight"):
        return torch.ones([stop - start for start, stop in box], device="cpu")
    if name.endswith("lrpe.theta"):
        j = torch.arange(config.embed_dim, dtype=torch.float64, device="cpu")
        theta = (10000 ** (-2 * j / config.embed_dim)).float().view(shape)
        return theta[tuple(slice(*edge) for edge in box)]
    (top, bottom), (left, right) = box
    value = torch.empty(bottom - top, right - left, device="cpu")
    if value.numel() == 0:
        return value
    for row in range(top - top % TILE, bottom, TILE):
        for column in range(left - left % TILE, right, TILE):
            tile = _tile(name, row, column, shape, config.init_std, seed)
            first, last = max(row, top), min(row + TILE, bottom)
            begin, end = max(column, left), min(column + TILE, right)
            value[first - top : last - top, begin - left : end - left] = tile[
                first - row : last - row, begin - column : end - column
            ]
    if name == "model.embed_tokens.weight" and top <= config.pad_id < bottom:
        value[config.pad_id - top] = 0
    return value


def _tile(name: str, row: int, column: int, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{name}/{row}/{column}".encode()).digest()
    generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    size = (min(TILE, shape[0] - row), min(TILE, shape[1] - column))
    return torch.empty(size, device="cpu").normal_(0.0, std, generator=generator)


def initial_parts(
    name: str, spec: ShardSpec, rank: int, size: int, start: int, stop: int, config: ModelConfig, seed: int
) -> Iterator[tuple[int, Tensor]]:
    """Elements [start, stop) of rank `rank`'s flat local part, as (first element, values), a band of rows at a time.

    What no piece covers is padding, zero.
    """
    local = spec.local_shape(rank, size)
    width = 1
    for length in local[1:]:
        width *= length
    at = 0  # rows of the local tensor that earlier blocks take
    for box, (begin, end) in zip(spec.boxes(rank, size), spec.local_rows(rank, size), strict=True):
        (top, bottom), rest = box[0], box[1:]
        first = max(start // width - at, 0)
        last = min(-(-stop // width) - at, bottom - top)
        row = top + first
        while row < top + last:
            # Bands end where tiles do, so that no tile is drawn twice for one range.
            below = min((row // TILE + 1) * TILE, top + last)
            values = initial_box(name, spec.shape, ((row, below), *rest), config, seed).reshape(-1)
            offset = (at + row - top) * width
            lower, upper = max(start - offset, 0), min(stop - offset, values.numel())
            yield offset + lower, values[lower:upper]
            row = below
        at += end - begin


@torch.no_grad()
def fill_initial(
    target: Tensor, name: str, spec: ShardSpec, rank: int, size: int, start: int, config: ModelConfig, seed: int
) -> None:
    """Write initial values into `target`, flat: elements from `start` on of rank `rank`'s flattened local part."""
    target.zero_()
    stop = start + target.numel()
    for offset, values in initial_parts(name, spec, rank, size, start, stop, config, seed):
        target[offset - start : offset - start + values.numel()].copy_(values)


@torch.no_grad()
def initialize(model: TransNormerLM, seed: int) -> None:
    """Fill every parameter of `model` with its part of the initial value."""
    axis = model.context.tp
    for name, parameter in model.named_parameters():
        fill_initial(parameter.view(-1), name, parameter.shard_spec, axis.rank, axis.size, 0, model.config, seed)
