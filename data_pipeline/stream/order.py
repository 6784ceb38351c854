"""The order of an epoch: which shard follows which, which document follows which, which sequence is trained on when.

All of it is a function of (seed, epoch) and the shards' token counts. Nothing is replayed: any position is found by
binary search in prefix sums over the shards.
"""

import functools
import hashlib

import numpy as np


def permutation(length: int, *key: int | str) -> np.ndarray:
    """A permutation of range(length), int64 [length], that depends on `key` alone.

    Sorting raw Philox output rather than calling a numpy shuffle: numpy promises that the raw bits never change between
    versions, and promises nothing of the kind for its shuffles. A run must resume under a later numpy.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    bits = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(length)
    return np.argsort(bits, kind="stable")


class EpochOrder:
    """One epoch of sequences over shards that hold `shard_tokens` [shards] tokens.

    Shards are permuted, their documents laid end to end (permuted within each shard, by whoever reads it), and all of
    it cut into sequences of `sequence_length` + 1 tokens with stride `sequence_length`. So that neighbours in a batch
    are not neighbours in text, sequences are permuted within windows of `window` consecutive shards. Memory: two
    numbers a shard, plus one a sequence of the windows in use. `key` tells one group of shards from another.
    """

    def __init__(
        self,
        shard_tokens: np.ndarray,
        *,
        sequence_length: int,
        seed: int,
        epoch: int,
        window: int,
        key: tuple[str, ...] = (),
    ):
        window = min(window, len(shard_tokens))
        self.shards = permutation(len(shard_tokens), seed, epoch, "shards", *key)
        self.ends = np.cumsum(shard_tokens[self.shards])  # [shards]: tokens up to and including each, in epoch order
        self.tokens = int(self.ends[-1])
        self.sequences = sequences_per_epoch(self.tokens, sequence_length)
        closing = np.minimum(np.arange(window, len(shard_tokens) + window, window), len(shard_tokens)) - 1
        # A sequence belongs to the window in which its first token lies.
        self._window_ends = np.minimum(-(-self.ends[closing] // sequence_length), self.sequences)
        # Bound per instance: a cache on the function would keep every epoch alive.
        self._within_window = functools.lru_cache(maxsize=4)(
            lambda number, length: permutation(length, seed, epoch, "window", number, *key)
        )

    def sequence(self, position: int) -> int:
        """The place in text of the sequence trained on at `position` of this epoch; both in [0, sequences)."""
        window = int(np.searchsorted(self._window_ends, position, side="right"))
        first = int(self._window_ends[window - 1]) if window else 0
        return first + int(self._within_window(window, int(self._window_ends[window]) - first)[position - first])


def sequences_per_epoch(tokens: int, sequence_length: int) -> int:
    """How many sequences cover `tokens` so that each token but the first is a target once."""
    return -(-(tokens - 1) // sequence_length)
