"""One shard as an epoch sees it: its documents permuted and laid end to end."""

import os
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

import numpy as np

from data_pipeline.errors import InputError
from data_pipeline.shards.index import OFFSET, TOKENS, parse_index
from data_pipeline.shards.manifest import Manifest
from data_pipeline.stream.order import permutation
from data_pipeline.stream.score_filter import KeptCounts, ScoreFilter, count_row, kept_documents


class DamagedShard(Exception):
    """A shard that was whole when the manifest was loaded and cannot be read now; the message names it."""


@dataclass(frozen=True)
class ShardView:
    """`ends` [documents]: tokens up to and including each kept document; `offsets` [documents]: bytes into the tar."""

    path: Path
    dtype: np.dtype
    ends: np.ndarray
    offsets: np.ndarray
    _file: FileIO = field(repr=False)

    @classmethod
    def open(
        cls,
        manifest: Manifest,
        number: int,
        *,
        seed: int,
        epoch: int,
        filter: ScoreFilter | None = None,
        counts: KeptCounts | None = None,
    ) -> "ShardView":
        """Shard `number` of `manifest` in the document order of `epoch`, without what `filter` drops. Raises
        DamagedShard, also when the filter keeps something else now than when `counts` were made."""
        shard = manifest.shards[number]
        try:
            index = parse_index(
                manifest.read(shard.index, sha256=shard.index_sha256),
                shard.index,
                documents=shard.documents,
                tokens=shard.tokens,
                size=shard.size,
                itemsize=manifest.dtype.itemsize,
            )
            if filter is not None:
                index = _kept(manifest, number, index, filter, counts)
            file = manifest.open(shard.name, size=shard.size, sha256=shard.sha256)
        except (InputError, OSError) as error:
            raise DamagedShard(f"shard {shard.name}: {error}") from None
        index = index[permutation(len(index), seed, epoch, "documents", number)]
        return cls(
            manifest.directory / shard.name, manifest.dtype, np.cumsum(index[:, TOKENS]), index[:, OFFSET].copy(), file
        )

    def read(self, start: int, out: np.ndarray) -> list[int]:
        """Fills `out` [n] with the tokens from `start` on; returns the places in `out` where a document begins.

        Positioned reads, not a memory map: a file truncated under a map kills the process with SIGBUS, a short read can
        be reported. From the page cache both cost about the same for documents of a kilobyte.
        """
        document = int(np.searchsorted(self.ends, start, side="right"))
        begin = start - (int(self.ends[document - 1]) if document else 0)
        itemsize, filled, starts = self.dtype.itemsize, 0, []
        while filled < len(out):
            if begin == 0:
                starts.append(filled)
            length = int(self.ends[document]) - (int(self.ends[document - 1]) if document else 0)
            count = min(length - begin, len(out) - filled)
            data = self._pread(count * itemsize, int(self.offsets[document]) + begin * itemsize)
            out[filled : filled + count] = np.frombuffer(data, self.dtype)
            filled, document, begin = filled + count, document + 1, 0
        return starts

    def _pread(self, size: int, offset: int) -> bytes:
        try:
            data = os.pread(self._file.fileno(), size, offset)
        except OSError as error:
            raise DamagedShard(f"shard {self.path.name}: {error.strerror} at byte {offset}") from None
        if len(data) != size:
            raise DamagedShard(f"shard {self.path.name}: ends inside the {size} bytes at byte {offset}")
        return data


def _kept(manifest: Manifest, number: int, index: np.ndarray, filter: ScoreFilter, counts: KeptCounts) -> np.ndarray:
    """The rows of a shard's index that the filter keeps, checked against what was counted."""
    shard = manifest.shards[number]
    kept, digest = kept_documents(manifest.read, shard, index, filter)
    counted = (
        *(int(column[number]) for column in (counts.documents, counts.tokens, counts.shortest)),
        counts.scores_sha256[number],
    )
    if count_row(shard, index, kept, digest) != counted:
        raise InputError(f"scores {filter.scores} are not those that the filter was counted from")
    return index[kept]
