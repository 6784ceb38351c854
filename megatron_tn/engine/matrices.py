"""The logical matrices of an optimizer that needs them whole (Muon), and the rank that updates each.

Tensor parallelism gives a rank rows or columns of a logical matrix; ZeRO and FSDP2 give it an element range of that.
Each matrix is assigned to one rank, so that no rank repeats another's work: to the one that holds most of it, where
that leaves the work as evenly shared. `engine.matrix_rounds` brings it there.

Where every data-parallel rank holds all masters (engine=local, zero0), each of them updates all matrices, as it updates
all elements; the matrices are shared out over tensor-parallel ranks.
"""

import heapq
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from megatron_tn.config import ConfigError, ModelConfig
from megatron_tn.model.registry import build_model
from megatron_tn.optim.groups import is_block_matrix
from megatron_tn.optim.muon import flops
from megatron_tn.parallel.sharding import ShardSpec

ROUND_ELEMENTS = 2**26  # 16 matrices of 2048 x 2048: enough to fill a GPU, 128 MiB in bf16


class Matrix(NamedTuple):
    """Rows of parameter `name` from row `top` on: a logical matrix of `shape` (rows, columns).

    sizes, starts: elements of each tensor-parallel rank's part, and where they begin in the rank's part of the
    parameter, flattened. dim: the dimension that the parts are cut along.
    """

    name: str
    top: int
    shape: tuple[int, int]
    sizes: tuple[int, ...]
    starts: tuple[int, ...]
    dim: int

    @property
    def cut_along_columns(self) -> bool:
        """Whether the concatenation of its flattened parts is not the flattened matrix."""
        return self.dim == 1 and len(self.sizes) > 1


class Held(NamedTuple):
    """The most elements of a matrix that one rank holds, and the first rank that holds so many."""

    elements: int
    rank: int


def matrices_of(name: str, spec: ShardSpec, tp: int, *, heads_apart: bool) -> list[Matrix]:
    """The logical matrices of a parameter: one, or one for each block of a packed projection; with `heads_apart` one
    for each head of a projection to heads.

    Raises:
        ConfigError: the parameter is replicated over several tensor-parallel ranks.
    """
    rows, columns = spec.shape
    if spec.dim is None and tp > 1:
        raise ConfigError(
            f"optim.name=muon has no update for {name}, of which parallel.tp={tp} ranks hold copies: set parallel.tp=1 "
            "or optim.name=adamw"
        )
    if spec.dim == 1:
        sizes = tuple(math.prod(spec.local_shape(rank, tp)) for rank in range(tp))
        return [Matrix(name, 0, (rows, columns), sizes, (0,) * tp, 1)]
    of_block = spec.heads if heads_apart else 1
    height = rows // spec.blocks // of_block
    found = []
    for number in range(spec.blocks * of_block):
        top, parts = number * height, []
        for rank in range(tp):
            block = number // of_block
            (begin, end), _ = spec.boxes(rank, tp)[block]
            at, _ = spec.local_rows(rank, tp)[block]
            first, last = max(top, begin), min(top + height, end)
            parts.append((max(last - first, 0) * columns, (at + first - begin) * columns))
        sizes, starts = zip(*parts, strict=True)
        found.append(Matrix(name, top, (height, columns), sizes, starts, 0))
    return found


def block_matrices(config: ModelConfig, tp: int = 1, *, heads_apart: bool) -> list[Matrix]:
    """All logical matrices of a model that Muon updates."""
    specs = build_model(config, None, "meta").shard_specs().items()
    chosen = ((name, spec) for name, spec in specs if is_block_matrix(name, len(spec.shape)))
    return [matrix for name, spec in chosen for matrix in matrices_of(name, spec, tp, heads_apart=heads_apart)]


def shared_out(matrices: Sequence[Matrix], ranks: int, held: Mapping[Matrix, Held] | None = None) -> list[list[Matrix]]:
    """Each rank's matrices, ordered by shape.

    How many it has of a shape: each matrix, the costliest first, counts for the rank with the least work so far. Which
    of them: those of which it holds most (`held`), up to that number. A matrix whose holder has its number goes to the
    next rank that has not.
    """
    found: list[list[Matrix]] = [[] for _ in range(ranks)]
    least = [(0, rank) for rank in range(ranks)]  # a heap of (work, rank)
    of_shape: dict[tuple[int, int], list[Matrix]] = {}
    for matrix in sorted(matrices, key=lambda matrix: matrix.cut_along_columns):
        of_shape.setdefault(matrix.shape, []).append(matrix)
    for shape, members in sorted(of_shape.items(), key=lambda item: (-flops(item[0]), item[0])):
        cost, counts = flops(shape), [0] * ranks
        for _ in members:
            work, rank = least[0]
            heapq.heapreplace(least, (work + cost, rank))
            counts[rank] += 1
        owners = _owners(held or dict.fromkeys(members, Held(0, 0)), members, counts)
        for matrix in members:
            found[owners[matrix]].append(matrix)
    return found


def _owners(held: Mapping[Matrix, Held], matrices: Sequence[Matrix], counts: Sequence[int]) -> dict[Matrix, int]:
    """The rank that updates each of `matrices`; counts: of each rank."""
    found, left = {}, list(counts)
    ordered = sorted(matrices, key=lambda matrix: -held[matrix].elements)
    for matrix in ordered:
        if left[held[matrix].rank]:
            left[held[matrix].rank] -= 1
            found[matrix] = held[matrix].rank
    following = list(range(len(left)))  # for each rank, the first from it on that may have more
    for matrix in ordered:
        if matrix not in found:
            rank = following[held[matrix].rank]
            while not left[rank]:
                rank = (rank + 1) % len(left)
            following[held[matrix].rank] = rank
            left[rank] -= 1
            found[matrix] = rank
    return found


def stays(matrix: Matrix, held: Held, rank: int) -> bool:
    """Whether no other rank holds elements of `matrix`, which `rank` updates."""
    return held == (math.prod(matrix.shape), rank)


def products_of(matrices: Sequence[Matrix], dtype: torch.dtype) -> dict[int, int]:
    """FLOPs of the iterations of `matrices` in `dtype`, by the smallest dimension of a product."""
    found: dict[int, int] = {}
    for matrix in matrices:
        size = min(matrix.shape)
        found[size] = found.get(size, 0) + flops(matrix.shape, dtype)
    return found


def batches(matrices: Sequence[Matrix]) -> list[list[Matrix]]:
    """Runs of matrices of one shape, of at most ROUND_ELEMENTS elements or one matrix each."""
    found = []
    for shape, run in itertools.groupby(matrices, key=lambda matrix: matrix.shape):
        count = max(1, ROUND_ELEMENTS // math.prod(shape))
        members = list(run)
        found += [members[first : first + count] for first in range(0, len(members), count)]
    return found
