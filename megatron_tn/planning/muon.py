"""What an update by Muon takes of a rank (optim/muon.py, engine/matrices.py): the Newton-Schulz iterations of the
matrices that it updates, and their exchange with the ranks that hold parts of them.
"""

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatron_tn.config import ModelConfig, TrainConfig, from_mapping, to_mapping
from megatron_tn.engine.base import DTYPES
from megatron_tn.engine.matrices import Matrix, batches, block_matrices, products_of, shared_out

# Bytes per parameter: direction 14, application 12 (kernels/muon), gradient norm 4; a matrix's norm, its division by
# it and the result in bf16 10 (kernels/newton_schulz).
ELEMENT_BYTES = 40
EQUAL_NORMS_BYTES = 6  # optim.equal_norms: bf16, read twice and written
# Share of a plain product's rate that iterations reach: symmetric products make their diagonal tiles whole, and store
# their other half. 128 matrices of 1B, 26.3 TFLOP: 55.8 ms (docs/measurements/2026-11-30.md), 39.3 at 670 TFLOP/s.
ITERATION_RATE = 0.70


def sharing(config: TrainConfig, world_size: int) -> tuple[str, int]:
    """The axis whose ranks share out the matrices, and their number."""
    engine, tp = config.engine, config.parallel.tp
    if engine.name == "local" or (engine.name == "deepspeed" and engine.zero_stage == 0):
        return "tp", tp
    return ("world" if tp > 1 else "data"), world_size


def matrix_elements(model: ModelConfig) -> int:
    """Elements of all parameters that Muon updates."""
    return sum(math.prod(matrix.shape) for matrix in _matrices(_key(model), heads_apart=False))


@dataclass(frozen=True)
class Work:
    """products: smallest dimension of a product -> FLOPs, of the rank with most to do. rounds: of an update. elements:
    of the largest round of a rank."""

    products: Mapping[int, int]
    rounds: int
    elements: int


def most_work(config: TrainConfig, world_size: int) -> Work:
    ranks, dtype = sharing(config, world_size)[1], DTYPES[config.engine.precision]
    return _most_work(_key(config.model), config.optim.heads_apart, ranks, dtype)


@functools.cache
def _most_work(model: str, heads_apart: bool, ranks: int, dtype: torch.dtype) -> Work:
    shares = shared_out(_matrices(model, heads_apart), ranks)
    products = max((products_of(share, dtype) for share in shares), key=lambda each: sum(each.values()))
    rounds = [batches(share) for share in shares]
    largest = max(sum(math.prod(matrix.shape) for matrix in batch) for share in rounds for batch in share)
    return Work(products, max(map(len, rounds)), largest)


@functools.cache
def _matrices(model: str, heads_apart: bool) -> list[Matrix]:
    return block_matrices(from_mapping(ModelConfig, json.loads(model)), heads_apart=heads_apart)


def _key(model: ModelConfig) -> str:
    """Cache key, the settings that the work depends on: a search asks for many layouts of one model."""
    return json.dumps(to_mapping(model))
