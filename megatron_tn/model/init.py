"""Initial values of a rank's part of each parameter, identical for every parallel layout and engine.

An element is a function of the seed, the parameter's released name and the element's index in the logical tensor.
`Architecture.initial_box` computes values; this file maps them to a rank's local tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_tn.config import ModelConfig
from megatron_tn.model.base import Model
from megatron_tn.model.registry import architecture
from megatron_tn.model.tiles import TILE
from megatron_tn.parallel.sharding import ShardSpec


def initial_parts(
    name: str, spec: ShardSpec, rank: int, size: int, start: int, stop: int, config: ModelConfig, seed: int
) -> Iterator[tuple[int, Tensor]]:
    """Elements [start, stop) of rank `rank`'s flattened local part, in bands of at most TILE rows: (index of the band's
    first element, values) each. Elements in no band are padding, which is zero."""
    initial_box = architecture(config).initial_box
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
    """Write initial values into `target` [n]: elements [start, start + n) of rank `rank`'s flattened local part of the
    parameter `name`."""
    target.zero_()
    stop = start + target.numel()
    for offset, values in initial_parts(name, spec, rank, size, start, stop, config, seed):
        target[offset - start : offset - start + values.numel()].copy_(values)


@torch.no_grad()
def initialize(model: Model, seed: int) -> None:
    """Give every parameter of `model` this rank's part of its initial value."""
    axis = model.context.tp
    for name, parameter in model.named_parameters():
        fill_initial(parameter.view(-1), name, parameter.shard_spec, axis.rank, axis.size, 0, model.config, seed)
