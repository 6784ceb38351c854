"""The map from a global sample index to a sample."""

import functools
import hashlib
import json
import logging
import threading
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from data_pipeline.errors import InputError
from data_pipeline.stream.corpus import Corpus
from data_pipeline.stream.interleave import Interleave
from data_pipeline.stream.order import EpochOrder, sequences_per_epoch
from data_pipeline.stream.sample import IGNORED, Batch, Sample, collate
from data_pipeline.stream.shard_view import DamagedShard, ShardView
from data_pipeline.stream.state import Damage, Ledger, StreamState

logger = logging.getLogger(__name__)

# Part of the stream's hash: must be raised with every change of the samples' order or content.
ORDER_VERSION = 1
MOST_VIEWS = 256  # open shards, a file descriptor each; the usual limit of a process is 1024


class DamageLimitError(RuntimeError):
    """The number of unreadable samples exceeds the run's limit."""


class TokenStream:
    """Global samples 0, 1, 2, ... over unlimited epochs, each a function of (corpus, sequence length, index): the last
    stage before batches.

    Mixed sources are packed separately; without a mixture, and with equal epochs of all sources in the manifest, all
    are packed together. `samples_per_epoch`: length of the mixture's epoch.

    Sample p of a source's epoch holds tokens [p * N, p * N + N] of the epoch's concatenated documents: N inputs and,
    shifted by one, N targets, so each token but the first is a target once per epoch. The last sample of an epoch is
    padded with the pad id and targets of -100. Order: see `EpochOrder`; independent of ranks and workers.

    With `isolate_documents`, the target at a document's last token is -100 and batches have `cu_seqlens`; a sample has
    at most `max_documents` segments, by default (and at least) the maximum for N tokens of this corpus. `max_damaged`:
    allowed number of unreadable samples. Thread-safe and picklable.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        sequence_length: int,
        isolate_documents: bool = False,
        max_documents: int | None = None,
        window: int = 4,
        max_damaged: int = 100,
    ):
        for name, value, least in (
            ("sequence_length", sequence_length, 1),
            ("window", window, 1),
            ("seed", corpus.seed, 0),
        ):
            if value < least:
                raise InputError(f"{name}={value} must be at least {least}")
        self.corpus = corpus
        self.manifest = corpus.manifest
        self.seed = corpus.seed
        self.sequence_length = sequence_length
        self.groups = corpus.groups(sequence_length)
        self.samples_per_epoch = sum(group.samples for group in self.groups)
        self.max_documents = self._segment_bound(max_documents) if isolate_documents else None
        self.window = window
        self.max_damaged = max_damaged
        self.ledger = Ledger()
        self.damaged = 0  # samples recorded as unreadable by this instance
        self._open_caches()

    def _segment_bound(self, asked: int | None) -> int:
        # A continuation at the front and a beginning (or padding) at the end take at least one token each; documents in
        # between are whole.
        shortest = self.corpus.shortest
        bound = 1 if self.sequence_length == 1 else 2 + (self.sequence_length - 2) // shortest
        if asked is not None and asked < bound:
            raise InputError(
                f"max_documents={asked} is below {bound}: sequence_length={self.sequence_length} tokens can touch as "
                f"many documents, the shortest being of {shortest} tokens"
            )
        return asked or bound

    @functools.cached_property
    def stream_hash(self) -> str:
        """sha256 over everything that determines the map from sample index to sample."""
        identity = self.corpus.identity() | {
            "order_version": ORDER_VERSION,
            "sequence_length": self.sequence_length,
            "isolate_documents": self.max_documents is not None,
            "window": self.window,
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def sample(self, index: int) -> Sample:
        """Global sample `index`; padding if it is in the ledger or cannot be read. Does not change the ledger."""
        if index < 0:
            raise InputError(f"sample index={index} must not be negative")
        if index in self.ledger:
            return self._padding(None)
        number, place = self._interleave.locate(index)
        group = self.groups[number]
        epoch, position = divmod(place, sequences_per_epoch(int(group.tokens.sum()), self.sequence_length))
        try:
            return self._read(epoch, position, number)
        except DamagedShard as error:
            return self._padding(Damage(index, str(error)))

    def read(self, indices: Sequence[int]) -> Batch:
        """The batch of these samples, for prefetching: does not change the ledger."""
        samples = [self.sample(index) for index in indices]
        return collate(indices, samples, self.max_documents, self.manifest.tokenizer.pad)

    def batch(self, indices: Sequence[int]) -> Batch:
        """The batch of these samples; adds unreadable ones to the ledger. Raises DamageLimitError."""
        batch = self.read(indices)
        self.record(batch)
        return batch

    def record(self, batch: Batch) -> None:
        """Adds a batch's unreadable samples to the ledger. Called when the batch is used, not when it is prefetched, so
        that checkpoints do not depend on prefetching. Raises DamageLimitError."""
        for damage in batch.damaged:
            if damage.index in self.ledger:
                continue
            self.ledger.add(damage.index, damage.index + 1)
            self.damaged += 1
            logger.warning("sample %d is fed as padding: %s", damage.index, damage.reason)
            if self.damaged > self.max_damaged:
                raise DamageLimitError(
                    f"{self.damaged} samples could not be read, data.max_damaged={self.max_damaged}; the last: "
                    f"{damage.reason}"
                )

    def skip(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Replaces the samples in these half-open ranges of global indices by padding, also (by the ledger in the
        state) in every later resume. The loader's plan gives the samples of step k. Call this before iteration. Raises
        InputError for an empty or negative range."""
        for first, stop in ranges:
            self.ledger.add(first, stop)

    def state(self, next_sample: int) -> StreamState:
        """The state for a checkpoint; `next_sample`: first sample not yet trained on."""
        return StreamState(self.stream_hash, self.seed, next_sample, self.ledger.ranges)

    def restore(self, state: StreamState) -> int:
        """Loads a checkpoint's ledger, returns its next sample. Raises InputError when `state` is of another stream."""
        if state.stream_hash != self.stream_hash:
            raise InputError(
                f"stream state has stream_hash={state.stream_hash} (seed={state.seed}), this stream is "
                f"{self.stream_hash} (seed={self.seed}): shards (also ones added later), filter, document "
                "stages, mixture, sequence length, seed, window or isolation differ"
            )
        self.ledger = Ledger(state.skipped)
        return state.next_sample

    def _read(self, epoch: int, position: int, group: int) -> Sample:
        length, order, shards = self.sequence_length, self._order(epoch, group), self.groups[group].shards
        start = order.sequence(position) * length
        present = min(length + 1, order.tokens - start)
        buffer = np.full(length + 1, self.manifest.tokenizer.pad, dtype=np.int64)
        starts: list[int] = []
        filled, place = 0, int(np.searchsorted(order.ends, start, side="right"))
        while filled < present:
            begin = start + filled - (int(order.ends[place - 1]) if place else 0)
            count = min(int(order.ends[place]) - start, present) - filled
            if count == 0:  # a shard without kept documents
                place += 1
                continue
            view = self._view(epoch, int(shards[order.shards[place]]))
            self._prefetch(shards[order.shards[place + 1 : place + 1 + self.window]])
            piece = buffer[filled : filled + count]
            starts += [filled + at for at in view.read(begin, piece)]
            if piece.max() >= self.manifest.tokenizer.vocab_size:
                raise DamagedShard(f"shard {view.name}: token {piece.max()} is not below the vocabulary size")
            filled, place = filled + count, place + 1
        targets = buffer[1:].copy()
        targets[present - 1 :] = IGNORED
        if self.max_documents is not None:
            targets[[at - 1 for at in starts if at > 0]] = IGNORED
        if present < length:
            starts.append(present)
        segments = [0, *(at for at in starts if 0 < at < length)]
        return Sample(torch.from_numpy(buffer[:-1]), torch.from_numpy(targets), torch.tensor(segments))

    def _prefetch(self, numbers: np.ndarray) -> None:
        """Starts downloads of the next shards, if the manifest is remote."""
        if self.manifest.remote:
            coming = [self.manifest.shards[number] for number in numbers]
            self.manifest.remote.prefetch([(shard.name, shard.size, shard.sha256) for shard in coming])

    def _padding(self, damage: Damage | None) -> Sample:
        tokens = torch.full((self.sequence_length,), self.manifest.tokenizer.pad, dtype=torch.int64)
        return Sample(tokens, torch.full_like(tokens, IGNORED), torch.zeros(1, dtype=torch.int64), damage)

    def _open_caches(self) -> None:
        self._interleave = Interleave([group.samples for group in self.groups], seed=self.seed)
        self._orders = functools.lru_cache(maxsize=2 * len(self.groups))(
            lambda epoch, group: EpochOrder(
                self.groups[group].tokens,
                sequence_length=self.sequence_length,
                seed=self.seed,
                epoch=epoch,
                window=self.window,
                key=self.groups[group].key,
            )
        )
        # All shards of a window are in use together, and the next window begins before the last one ends.
        self._views = functools.lru_cache(maxsize=min((2 * self.window + 2) * len(self.groups), MOST_VIEWS))(
            self.corpus.view
        )
        self._lock = threading.Lock()

    def _order(self, epoch: int, group: int = 0) -> EpochOrder:
        with self._lock:
            return self._orders(epoch, group)

    def _view(self, epoch: int, number: int) -> ShardView:
        with self._lock:
            return self._views(epoch, number)

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_orders", "_views", "_lock", "_interleave")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open_caches()
