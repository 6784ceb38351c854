"""What an update by Muon takes of a rank: the Newton-Schulz iterations of the matrices that it updates (optim/muon.py,
engine/matrices.py), and their exchange with the ranks that hold parts of them (engine/matrix_rounds.py).
"""

import functools
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_tn.config import ModelConfig, TrainConfig, from_mapping, to_mapping
from megatron_tn.engine.base import DTYPES
from megatron_tn.engine.matrices import Held, Matrix, batches, block_matrices, products_of, shared_out, stays

# Bytes per parameter: direction 14, application 12 (kernels/muon), gradient norm 4; a matrix's norm, its division by
# it and the result in bf16 10 (kernels/newton_schulz).
ELEMENT_BYTES = 40
EQUAL_NORMS_BYTES = 6  # optim.equal_norms: bf16, read twice and written
# Share of a plain product's rate that iterations reach: symmetric products make their diagonal tiles whole, and store
# their other half. 128 matrices of 1B, 26.3 TFLOP: 55.8 ms (docs/measurements/2026-11-30.md), 39.3 at 670 TFLOP/s.
ITERATION_RATE = 0.70


def sharing(config: TrainConfig, world_size: int) -> tuple[str, int]:
    """The axis whose ranks share out the matrices, and their number."""
    tp = config.parallel.tp
    if not config.engine.shards_state:
        return "tp", tp
    return ("world" if tp > 1 else "data"), world_size


def matrix_elements(model: ModelConfig) -> int:
    """Elements of all parameters that Muon updates."""
    return sum(math.prod(matrix.shape) for matrix in _matrices(_key(model), heads_apart=False, tp=1))


@dataclass(frozen=True)
class Work:
    """products: smallest dimension of a product -> FLOPs, of the rank with most to do. elements: of the largest round
    of a rank."""

    products: Mapping[int, int]
    elements: int


def most_work(config: TrainConfig, world_size: int) -> Work:
    ranks, dtype = sharing(config, world_size)[1], DTYPES[config.engine.precision]
    return _most_work(_key(config.model), config.optim.heads_apart, ranks, dtype)


@functools.cache
def _most_work(model: str, heads_apart: bool, ranks: int, dtype: torch.dtype) -> Work:
    shares = shared_out(_matrices(model, heads_apart, 1), ranks)
    products = max((products_of(share, dtype) for share in shares), key=lambda each: sum(each.values()))
    largest = max(sum(math.prod(matrix.shape) for matrix in batch) for share in shares for batch in batches(share))
    return Work(products, largest)


class Links(NamedTuple):
    """Elements that come to a rank over NVLink and over the network: of each the most of any rank."""

    nvlink: int
    network: int


@dataclass(frozen=True)
class Exchange:
    """What the ranks of an update send each other. rounds: those with an all-to-all. elements: held by one rank and
    updated by another. gathered, scattered: of the all-to-alls before and after the iterations."""

    rounds: int
    elements: int
    gathered: Links
    scattered: Links


def exchange(config: TrainConfig, world_size: int, on_a_node: int) -> Exchange:
    """on_a_node: ranks of the axis that share out the matrices on one node."""
    engine, tp = config.engine, config.parallel.tp
    ranks = sharing(config, world_size)[1]
    cut = "rows" if engine.name == "fsdp2" else "each" if engine.zero_stage == 3 else "flat"
    return _exchange(_key(config.model), config.optim.heads_apart, tp, ranks // tp, cut, on_a_node)


@functools.cache
def _exchange(model: str, heads_apart: bool, tp: int, data: int, cut: str, on_a_node: int) -> Exchange:
    matrices = _matrices(model, heads_apart, tp)
    holders = dict(zip(matrices, _holders(matrices, tp, data, cut), strict=True))
    held = {matrix: _most(of) for matrix, of in holders.items()}
    shares = shared_out(matrices, tp * data, held)
    gathered, scattered = ([[0, 0] for _ in shares] for _ in range(2))  # of each rank, by link
    for rank, share in enumerate(shares):
        for matrix in share:
            for holder, length in holders[matrix].items():
                if holder != rank:
                    link = int(holder // on_a_node != rank // on_a_node)
                    gathered[rank][link] += length
                    scattered[holder][link] += length
    of_rounds = itertools.zip_longest(*map(batches, shares), fillvalue=())
    rounds = sum(not all(stays(m, held[m], rank) for rank, part in enumerate(of) for m in part) for of in of_rounds)
    links = (Links(*map(max, zip(*of_ranks, strict=True))) for of_ranks in (gathered, scattered))
    return Exchange(rounds, sum(map(sum, gathered)), *links)


def _most(elements: Mapping[int, int]) -> Held:
    """elements: by rank."""
    rank = min(elements, key=lambda rank: (-elements[rank], rank))
    return Held(elements[rank], rank)


def _holders(matrices: list[Matrix], tp: int, data: int, cut: str) -> list[dict[int, int]]:
    """For each matrix: rank -> elements that it holds. cut: how a tensor-parallel rank's part is cut over `data` ranks:
    "flat" (ZeRO 1 and 2: all parameters behind each other), "each" (ZeRO 3: every parameter) or "rows" (FSDP2: every
    parameter, between two rows). Padding is left out."""
    of_name = {name: list(members) for name, members in itertools.groupby(matrices, key=lambda matrix: matrix.name)}
    lengths = {name: [sum(m.sizes[t] for m in members) for t in range(tp)] for name, members in of_name.items()}
    totals = [sum(length[t] for length in lengths.values()) for t in range(tp)]
    found, before = [], [0] * tp
    for name, members in of_name.items():
        for matrix in members:
            elements: dict[int, int] = {}
            for t, size in enumerate(matrix.sizes):
                length = totals[t] if cut == "flat" else lengths[name][t]
                unit = 1
                if cut == "rows":
                    unit = matrix.shape[1] if matrix.dim == 0 else size // matrix.shape[0]
                part = unit * -(-length // unit // data)
                first = matrix.starts[t] + (before[t] if cut == "flat" else 0)
                for d in range(first // part, -(-(first + size) // part)):
                    elements[d * tp + t] = min(first + size, (d + 1) * part) - max(first, d * part)
            found.append({rank: length for rank, length in elements.items() if length})
        before = [at + length for at, length in zip(before, lengths[name], strict=True)]
    return found


@functools.cache
def _matrices(model: str, heads_apart: bool, tp: int) -> list[Matrix]:
    return block_matrices(from_mapping(ModelConfig, json.loads(model)), tp, heads_apart=heads_apart)


def _key(model: ModelConfig) -> str:
    """Cache key, the settings that the work depends on: a search asks for many layouts of one model."""
    return json.dumps(to_mapping(model))
