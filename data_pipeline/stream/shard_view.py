"""One shard in an epoch: its documents, permuted and concatenated."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from io import FileIO

import numpy as np


class DamagedShard(Exception):
    """A shard that passed the checks of `Manifest.load` but cannot be read now; the message names it."""


@dataclass(frozen=True)
class ShardView:
    """`ends` [documents]: cumulative tokens of the kept documents; `offsets` [documents]: byte offsets in the tar;
    `edit`: function (place, tokens [n]) -> edited tokens [n]."""

    name: str
    dtype: np.dtype
    ends: np.ndarray
    offsets: np.ndarray
    file: FileIO = field(repr=False)
    edit: Callable[[int, np.ndarray], np.ndarray] | None = None

    def read(self, start: int, out: np.ndarray) -> list[int]:
        """Fills `out` [n] with tokens [start, start + n); returns the indices in `out` where a document begins.

        Reads only these tokens; with `edit`, whole documents.
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
        """The tokens of document `place` of the view, int64 [n]."""
        tokens = self._tokens(place, 0, self._end(place) - self._end(place - 1)).astype(np.int64)
        return tokens if self.edit is None else self.edit(place, tokens)

    def _end(self, place: int) -> int:
        return int(self.ends[place]) if place >= 0 else 0

    def _tokens(self, place: int, begin: int, count: int) -> np.ndarray:
        """Stored tokens [begin, begin + count) of a document.

        pread, not a memory map: a file truncated under a map kills the process with SIGBUS, but a short read can be
        reported. For documents of a kilobyte in the page cache, both are about equally fast.
        """
        size, offset = count * self.dtype.itemsize, int(self.offsets[place]) + begin * self.dtype.itemsize
        try:
            data = os.pread(self.file.fileno(), size, offset)
        except OSError as error:
            raise DamagedShard(f"shard {self.name}: {error.strerror} at byte {offset}") from None
        if len(data) != size:
            raise DamagedShard(f"shard {self.name}: ends inside the {size} bytes at byte {offset}")
        return np.frombuffer(data, self.dtype)
