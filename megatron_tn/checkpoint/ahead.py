"""Read a checkpoint while the model is built: one read of the disk checks the files and feeds the load.

Rank r of R reads the files r, r + R, ... into the block of host memory that its saves use later, and hashes them on the
way. In the layout that saved the checkpoint these are the bytes that the rank owns. In another layout it owns parts of
many files. Files that other ranks of its machine have read are in their blocks, which it maps (`shared_memory`); the
load reads from the disk only what ranks of other machines hold.
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
from megatron_tn.checkpoint.manifest import Piece
from megatron_tn.checkpoint.parts import FileRecord, read_file
from megatron_tn.checkpoint.shares import files_of_rank, scattered
from megatron_tn.checkpoint.verify import problems_of_file
from megatron_tn.device.host_memory import HostMemory
from megatron_tn.device.shared_memory import Address, mapped
from megatron_tn.device.threads import start_thread


class Holding(NamedTuple):
    """Files that a rank has in memory. places: file -> the bytes [first, last) of its block that the file lies in."""

    address: Address
    places: dict[str, tuple[int, int]]


class Contents(Mapping[str, np.ndarray]):
    """File -> its bytes, uint8 [size], to be read only. mine: in this rank's block. others: in other ranks' blocks; a
    block is mapped when a file in it is first asked for."""

    def __init__(self, mine: Mapping[str, np.ndarray], others: Sequence[Holding] = ()):
        self._mine = mine
        self._others = {name: (other.address, *place) for other in others for name, place in other.places.items()}
        self._mapped = functools.cache(mapped)

    def __getitem__(self, name: str) -> np.ndarray:
        if name in self._mine:
            return self._mine[name]
        address, first, last = self._others[name]
        if (block := self._mapped(address)) is None:
            raise KeyError(name)
        return block[first:last]

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
            size = sum(round_up(record.size) for record, _ in self._files.values())
            self.memory.prepare(size // torch.float32.itemsize, self.pinned, fill=self._read)
        elif self.verify:
            self._thread = start_thread(self._read, "read-ahead")

    def problems(self, directory: Path) -> list[str]:
        """One line for each problem in this rank's files; none without `verify`. Waits for the files."""
        if directory != self._directory:
            self.begin(directory)
        self._join()
        if self.verify and not self._ended:  # there was not enough memory
            self._read()
        if self._error is not None:
            raise self._error
        return self._problems

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

    def _neighbours(self, mine: Mapping[str, np.ndarray]) -> list[Holding]:
        """What ranks with this rank's host name hold. Collective."""
        held = None
        if mine and self.memory.address is not None:
            held = Holding(self.memory.address, {name: self._places[name] for name in mine})
        everyones: list[tuple[str, Holding | None]] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object((socket.gethostname(), held), everyones, dst=0)

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
        self._contents: dict[str, np.ndarray] = {}
        self._places: dict[str, tuple[int, int]] = {}
        self._problems: list[str] = []
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
            for name, (record, pieces) in self._files.items():
                into = None
                if block is not None:
                    into = block.numpy().view(np.uint8)[at : at + round_up(record.size)]
                if self._is_whole(name, record, pieces, into) and into is not None:
                    self._contents[name], self._places[name] = into[: record.size], (at, at + record.size)
                at += round_up(record.size)
        except Exception as error:  # raised by `problems`
            self._error = error
        self._ended = True

    def _is_whole(self, name: str, record: FileRecord, pieces: Mapping[str, Piece], into: np.ndarray | None) -> bool:
        path = self._directory / name
        if not self.verify:
            with contextlib.suppress(OSError):  # else the load reads the file itself, and says what is wrong with it
                return read_file(path, into) == record.size
            return False
        found = problems_of_file(path, record, pieces, into)
        self._problems += found
        return not found
