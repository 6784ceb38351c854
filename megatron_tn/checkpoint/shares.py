"""What each rank needs of a checkpoint's manifest, which rank 0 alone reads.

A manifest lists every piece of every rank: 116 MB for 175B on 512 ranks with ZeRO 3, which all of them would read. So
each says which pieces it fills, and rank 0 sends it the stored pieces that overlap them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist

from megatron_tn.checkpoint.manifest import CheckpointManifest, Piece
from megatron_tn.checkpoint.parts import FileRecord, share_of
from megatron_tn.checkpoint.reshard import Grid
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.parallel.world import first_for_all

Wanted = Mapping[str, Sequence[Piece]]  # parameter -> pieces of it that a rank fills


def share_of_manifest(directory: Path, wanted: Wanted, context: ParallelContext) -> CheckpointManifest:
    """The manifest with the stored pieces that a rank needs to fill `wanted`, and on several ranks without `files`.
    Collective over all ranks of `context`.

    Raises:
        ConfigError: on every rank: see `CheckpointManifest.read`.
    """
    if context.world_size == 1:
        return CheckpointManifest.read(directory)
    everyones = gathered(dict(wanted), context.rank, context.world_size)

    def shares() -> list[CheckpointManifest]:
        manifest = CheckpointManifest.read(directory)
        return [replace(manifest, pieces=found, files={}) for found in needed(manifest.pieces, everyones)]

    try:
        return scattered(shares, context.rank, context.world_size)
    finally:
        CheckpointManifest.forget()


def needed(stored: Mapping[str, Sequence[Piece]], everyones: Sequence[Wanted]) -> list[dict[str, list[Piece]]]:
    """For each rank, kind/NAME -> the pieces of `stored` whose rows and columns overlap the pieces that it wants."""
    found: list[dict[str, list[Piece]]] = [{} for _ in everyones]
    for key, pieces in stored.items():
        name = key.partition("/")[2]
        ranks = [rank for rank, wanted in enumerate(everyones) for _ in wanted.get(name, ())]
        if not ranks or not pieces:
            continue
        there = _edges(pieces)
        here = _edges([piece for wanted in everyones for piece in wanted.get(name, ())])
        overlap = (here[:, None, 0] < there[None, :, 1]) & (there[None, :, 0] < here[:, None, 1])
        overlap &= (here[:, None, 2] < there[None, :, 3]) & (there[None, :, 2] < here[:, None, 3])
        pairs = {(ranks[mine], at) for mine, at in zip(*map(np.ndarray.tolist, overlap.nonzero()), strict=True)}
        for rank, at in sorted(pairs):
            found[rank].setdefault(key, []).append(pieces[at])
    return found


def _edges(pieces: Sequence[Piece]) -> np.ndarray:
    """For each piece, the rows [top, bottom) and columns [left, right) of the logical matrix that it lies within."""
    found = np.empty((len(pieces), 4), dtype=np.int64)
    for index, piece in enumerate(pieces):
        grid = Grid.of(piece)
        bottom = grid.top + -(-piece.stop // grid.width)
        found[index] = grid.top + piece.start // grid.width, bottom, grid.left, grid.left + grid.width
    return found


class FileShare(NamedTuple):
    """Bytes [first, last) of a file. record, pieces by key: of the whole file."""

    record: FileRecord
    pieces: dict[str, Piece]
    first: int
    last: int

    @property
    def is_whole(self) -> bool:
        return self.last - self.first == self.record.size


def files_of_rank(directory: Path, rank: int, size: int) -> dict[str, FileShare]:
    """What rank `rank` of `size` reads of a checkpoint, each byte one of them: name -> its share of that file. Every
    `size`th file from the one of number `rank` on, whole; of fewer files than ranks several ranks share each.
    Collective over `size` ranks, where there are process groups.

    Raises:
        ConfigError: on every rank: see `CheckpointManifest.read`.
    """

    def shares() -> list[dict[str, FileShare]]:
        contents = by_file(CheckpointManifest.read(directory))
        return [_files_of_rank(contents, each, size) for each in range(size)]

    return scattered(shares, rank, size) if dist.is_initialized() else shares()[rank]


def _files_of_rank(
    contents: Mapping[str, tuple[FileRecord, dict[str, Piece]]], rank: int, size: int
) -> dict[str, FileShare]:
    names = sorted(contents)
    if size <= len(names) or not names:
        return {name: FileShare(*contents[name], 0, contents[name][0].size) for name in names[rank::size]}
    number, place = divmod(rank, len(names))
    record, pieces = contents[names[place]]
    share = FileShare(record, pieces, *share_of(record, number, len(range(place, size, len(names)))))
    return {names[place]: share} if share.first < share.last else {}


def by_file(manifest: CheckpointManifest) -> dict[str, tuple[FileRecord, dict[str, Piece]]]:
    """File name -> (its record, key -> the piece stored under it)."""
    found: dict[str, tuple[FileRecord, dict[str, Piece]]] = {name: (one, {}) for name, one in manifest.files.items()}
    for pieces in manifest.pieces.values():
        for piece in pieces:
            if piece.file in found:
                found[piece.file][1][piece.key] = piece
    return found


def gathered(value: Any, rank: int, size: int, group: dist.ProcessGroup | None = None) -> list[Any]:
    """On rank 0 the value of every one of ranks 0 .. size - 1, in their order, and on the others none. Collective."""
    if size == 1:
        return [value]
    found = [None] * size if rank == 0 else None
    dist.gather_object(value, found, dst=0, group=group)
    return found or []


def everyones_problems(problems: list[str], rank: int, size: int) -> list[str]:
    """The lines of all of ranks 0 .. size - 1, each line once, on every one of them. Collective."""
    found = gathered(problems, rank, size)
    return first_for_all(lambda: list(dict.fromkeys(chain.from_iterable(found))))


def scattered(shares: Callable[[], Sequence[Any]], rank: int, size: int) -> Any:
    """This rank's element of the list that `shares()` returns on rank 0, for ranks 0 .. size - 1. Collective.

    Raises:
        Exception: on every rank: what `shares()` raised.
    """
    values: Sequence[Any] | None = None
    if rank == 0:
        try:
            values = shares()
        except Exception as error:  # else the others would wait for rank 0 without a reason
            values = [error] * size
    mine = [values and values[0]]
    if size > 1:
        dist.scatter_object_list(mine, list(values) if values else None, src=0)
    if isinstance(mine[0], Exception):
        raise mine[0]
    return mine[0]
