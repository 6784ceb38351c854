"""Initial values of a rank's part of each parameter, identical for every parallel layout and engine.

An element is a function of the seed, the parameter's released name and the element's index in the logical tensor.
`Architecture.initial_box` computes values; this file maps them to a rank's local tensor.
"""

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_tn.config import ModelConfig
from megatron_tn.model.base import Model
from megatron_tn.model.registry import architecture
from megatron_tn.model.tiles import TILE
from megatron_tn.parallel.sharding import Box, ShardSpec
from megatron_tn.parallel.world import processes_here

MOST_THREADS = 16


class Band(NamedTuple):
    """Rows of one box of a rank's part of a parameter, of which elements [lower, upper) are wanted.

    offset: of the band's first element in the rank's flattened part.
    """

    box: Box
    offset: int
    lower: int
    upper: int


def bands(spec: ShardSpec, rank: int, size: int, start: int, stop: int) -> Iterator[Band]:
    """The bands of elements [start, stop) of rank `rank`'s flattened local part, of at most TILE rows each. Elements in
    no band are padding."""
    local = spec.local_shape(rank, size)
    width = math.prod(local[1:])
    at = 0  # rows of the local tensor before this box
    for box, (begin, end) in zip(spec.boxes(rank, size), spec.local_rows(rank, size), strict=True):
        (top, bottom), rest = box[0], box[1:]
        first = max(start // width - at, 0)
        last = min(-(-stop // width) - at, bottom - top)
        row = top + first
        while row < top + last:
            below = min((row // TILE + 1) * TILE, top + last)  # bands end at tile edges: each tile is drawn once
            offset = (at + row - top) * width
            yield Band(((row, below), *rest), offset, max(start - offset, 0), min(stop - offset, (below - row) * width))
            row = below
        at += end - begin


def threads() -> int:
    """Number of threads that draw values: this process's share of the machine's cores, and at most as many as the cores
    that the process is bound to, as srun binds each task to its own."""
    cores = os.cpu_count() or 1
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores  # macOS has no such function
    return max(1, min(MOST_THREADS, bound, cores // processes_here()))


@torch.no_grad()
def fill_initial(
    target: Tensor, name: str, spec: ShardSpec, rank: int, size: int, start: int, config: ModelConfig, seed: int
) -> None:
    """Write initial values into `target` [n]: elements [start, start + n) of rank `rank`'s flattened local part of the
    parameter `name`; zero where they are padding."""
    initial_box = architecture(config).initial_box

    @torch.no_grad()
    def fill(band: Band) -> None:
        values = initial_box(name, spec.shape, band.box, config, seed).reshape(-1)[band.lower : band.upper]
        first = band.offset + band.lower - start
        target[first : first + len(values)].copy_(values)

    target.zero_()
    wanted = bands(spec, rank, size, start, start + target.numel())
    if (count := threads()) == 1:
        for band in wanted:
            fill(band)
        return
    with ThreadPoolExecutor(count) as pool:  # drawing random numbers releases Python's lock
        for _ in pool.map(fill, wanted):
            pass


@torch.no_grad()
def initialize(model: Model, seed: int) -> None:
    """Give every parameter of `model` this rank's part of its initial value."""
    axis = model.context.tp
    for name, parameter in model.named_parameters():
        fill_initial(parameter.view(-1), name, parameter.shard_spec, axis.rank, axis.size, 0, model.config, seed)
