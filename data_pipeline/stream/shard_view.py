"""One shard as an epoch sees it: its documents permuted and laid end to end."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from io import FileIO

import numpy as np


class DamagedShard(Exception):
    """A shard that was whole when the manifest was loaded and cannot be read now; the message names it."""


@dataclass(frozen=True)
class ShardView:
    """`ends` [documents]: tokens up to and including each kept document; `offsets` [documents]: bytes into the tar;
    `edit`: what becomes of the tokens [n] of the document at a place, as many."""

    name: str
    dtype: np.dtype
    ends: np.ndarray
    offsets: np.ndarray
    file: FileIO = field(repr=False)
    edit: Callable[[int, np.ndarray], np.ndarray] | None = None

    def read(self, start: int, out: np.ndarray) -> list[int]:
        """Fills `out` [n] with the tokens from `start` on; returns the places in `out` where a document begins.

        Only what is asked for is read, unless documents are edited: an edit sees whole ones.
        """
        document = int(np.searchsorted(self.ends, start, side="right"))
        begin = start - self._end(document - 1)
        filled, starts = 0, []
        while filled < len(out):
            if begin == 0:
                starts.append(filled)
            count = min(self._end(document) - self._end(document - 1) - begin, len(out) - filled)
            if self.edit is None:
                out[filled : filled + count] = self._tokens(document, begin, count)
            else:
                out[filled : filled + count] = self.document(document)[begin : begin + count]
            filled, document, begin = filled + count, document + 1, 0
        return starts

    def document(self, place: int) -> np.ndarray:
        """The tokens of the document at a place, int64 [n]."""
        tokens = self._tokens(place, 0, self._end(place) - self._end(place - 1)).astype(np.int64)
        return tokens if self.edit is None else self.edit(place, tokens)

    def _end(self, place: int) -> int:
        return int(self.ends[place]) if place >= 0 else 0

    def _tokens(self, place: int, begin: int, count: int) -> np.ndarray:
        """`count` stored tokens of a document, from its token `begin` on.

        Positioned reads, not a memory map: a file truncated under a map kills the process with SIGBUS, a short read can
        be reported. From the page cache both cost about the same for documents of a kilobyte.
        """
        size, offset = count * self.dtype.itemsize, int(self.offsets[place]) + begin * self.dtype.itemsize
        try:
            data = os.pread(self.file.fileno(), size, offset)
        except OSError as error:
            raise DamagedShard(f"shard {self.name}: {error.strerror} at byte {offset}") from None
        if len(data) != size:
            raise DamagedShard(f"shard {self.name}: ends inside the {size} bytes at byte {offset}")
        return np.frombuffer(data, self.dtype)
