"""Read a checkpoint while the model is built: one read of the disk checks the files and feeds the load.

Rank r of R reads the files r, r + R, ... into the block of host memory that its saves use later, and hashes them on the
way; where there are fewer files than ranks, several ranks read a file, each its share (`shares.files_of_rank`). In the
layout that saved the checkpoint these are the bytes that the rank owns. In another layout it owns parts of many files.
What other ranks of its machine have read is in their blocks, which it maps (`shared_memory`); the load reads from the
disk only what ranks of other machines hold.
"""

import contextlib
import functools
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tn.checkpoint.direct import round_up
from megatron_tn.checkpoint.parts import digests_of_share, joined_digest, read_file
from megatron_tn.checkpoint.shares import FileShare, files_of_rank, gathered, scattered
from megatron_tn.checkpoint.verify import problems_of_digest, problems_of_file, problems_of_header
from megatron_tn.device.host_memory import HostMemory
from megatron_tn.device.shared_memory import Address, mapped
from megatron_tn.device.threads import start_thread
from megatron_tn.parallel.world import of_all


class Place(NamedTuple):
    """Bytes of a file from byte `at` on, which lie in bytes [first, last) of a block."""

    at: int
    first: int
    last: int


class Holding(NamedTuple):
    """What a rank has in memory: file -> the place of its share."""

    address: Address
    places: dict[str, Place]


class Contents(Mapping[str, list[tuple[int, np.ndarray]]]):
    """File -> (first byte, uint8 [n]) of each share of it that is in memory, in the file's order, to be read only.
    mine: in this rank's block. others: in the blocks of this machine's ranks; a block is mapped when a file in it is
    first asked for."""

    def __init__(self, mine: Mapping[str, tuple[int, np.ndarray]], others: Sequence[Holding] = ()):
        self._mine = mine
        self._others: dict[str, list[tuple[Place, Address]]] = {}
        for other in others:
            for name, place in other.places.items():
                self._others.setdefault(name, []).append((place, other.address))
        self._mapped = functools.cache(mapped)

    def __getitem__(self, name: str) -> list[tuple[int, np.ndarray]]:
        found = dict([self._mine[name]] if name in self._mine else [])
        for place, address in self._others.get(name, []):
            if place.at not in found and (block := self._mapped(address)) is not None:
                found[place.at] = block[place.first : place.last]
        if not found:
            raise KeyError(name)
        return sorted(found.items())

    def __iter__(self) -> Iterator[str]:
        return iter(self._mine.keys() | self._others.keys())

    def __len__(self) -> int:
        return len(self._mine.keys() | self._others.keys())


class ReadAhead:
    """Reads one checkpoint at a time. verify: whether its files are checked. memory: keeps the files' bytes until the
    next save; None: they are only checked. pinned: whether `memory` is page-locked."""

    def __init__(self, rank: int, size: int, memory: HostMemory | None, *, verify: bool, pinned: bool):
        self.rank = rank
        self.size = size
        self.memory = memory
        self.verify = verify
        self.pinned = pinned
        self._thread: threading.Thread | None = None
        self.forget()

    def begin(self, directory: Path) -> None:
        """Begin to read `directory`, which has no problems by `verify.glance`. Collective."""
        self.forget()
        self._directory, self._files = directory, files_of_rank(directory, self.rank, self.size)
        if self.memory is not None:
            if self.pinned:
                torch.cuda.init()  # a thread begins on this thread's device only if CUDA is initialised
            size = sum(round_up(share.last - share.first) for share in self._files.values())
            self.memory.prepare(size // torch.float32.itemsize, self.pinned, fill=self._read)
        elif self.verify:
            self._thread = start_thread(self._read, "read-ahead")

    def problems(self, directory: Path) -> list[str]:
        """One line for each problem in this rank's files, on one of the ranks that share a file; none without `verify`.
        Waits for the files. Collective."""
        if directory != self._directory:
            self.begin(directory)
        self._join()
        if self.verify and not self._ended:  # there was not enough memory
            self._read()
        everyones = of_all(self._digests) if self.verify else [self._digests]
        if self._error is not None:
            raise self._error
        return [*self._problems, *self._problems_of_digests(everyones)]

    def _problems_of_digests(self, everyones: Sequence[Mapping[str, dict[int, bytes] | None]]) -> Iterator[str]:
        """Of files whose first share is this rank's. everyones: each rank's `_digests`."""
        for name, share in self._files.items():
            found = [digests[name] for digests in everyones if name in digests]
            if found and share.first == 0 and None not in found:
                digest = joined_digest(found, share.record.sha256)
                yield from problems_of_digest(self._directory / name, share.record, digest)

    @contextlib.contextmanager
    def contents(self, directory: Path) -> Iterator[Contents]:
        """The files of `directory` that are in the memory of ranks of this machine. Waits for them, and at the end for
        all ranks: no rank uses them any more, and a save may overwrite them. Collective."""
        self._join()
        mine = self._contents if directory == self._directory else {}
        if self.size == 1 or not dist.is_initialized():
            yield Contents(mine)
        else:
            yield Contents(mine, self._neighbours(mine))
            dist.all_reduce(torch.zeros(1))  # a barrier that no GPU takes part in

    def _neighbours(self, mine: Mapping[str, tuple[int, np.ndarray]]) -> list[Holding]:
        """What ranks with this rank's host name hold. Collective."""
        held = None
        if mine and self.memory.address is not None:
            held = Holding(self.memory.address, dict(self._places))
        everyones: list[tuple[str, Holding | None]] = gathered((socket.gethostname(), held), self.rank, self.size)

        def shares() -> list[list[Holding]]:
            on: dict[str, list[Holding]] = {host: [] for host, _ in everyones}
            for host, held in everyones:
                on[host] += [held] if held else []
            return [on[host] for host, _ in everyones]

        return scattered(shares, self.rank, self.size)

    def forget(self) -> None:
        """Leave the memory to the next save."""
        self._join()
        self._directory: Path | None = None
        self._contents: dict[str, tuple[int, np.ndarray]] = {}
        self._places: dict[str, Place] = {}
        self._problems: list[str] = []
        # Of files that several ranks read: those of this rank's parts, by their first bytes; None where it read none.
        self._digests: dict[str, dict[int, bytes] | None] = {}
        self._error: Exception | None = None
        self._ended = False

    def _join(self) -> None:
        if self.memory is not None:
            self.memory.join()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _read(self, block: Tensor | None = None) -> None:
        """Read, check and, in `block`, keep this rank's files."""
        try:
            at = 0
            for name, share in self._files.items():
                into, size = None, share.last - share.first
                if block is not None:
                    into = block.numpy().view(np.uint8)[at : at + round_up(size)]
                if self._is_sound(name, share, into) and into is not None:
                    self._contents[name] = share.first, into[:size]
                    self._places[name] = Place(share.first, at, at + size)
                at += round_up(size)
        except Exception as error:  # raised by `problems`
            self._error = error
        self._ended = True

    def _is_sound(self, name: str, share: FileShare, into: np.ndarray | None) -> bool:
        """Whether the share could be read and has no problem, but for those that its parts' digests will show."""
        path, (record, pieces, first, last) = self._directory / name, share
        if not self.verify:
            with contextlib.suppress(OSError):  # else the load reads the file itself, and says what is wrong with it
                return read_file(path, into, first) == last - first
            return False
        if share.is_whole:
            found = problems_of_file(path, record, pieces, into)
        else:
            found = problems_of_header(path, record, pieces) if first == 0 else []
            self._digests[name] = None
            try:
                if not found:
                    self._digests[name] = digests_of_share(path, record.sha256, first, last, into)
            except OSError as error:
                found.append(f"{path} cannot be read: {error.strerror}")
        self._problems += found
        return not found
