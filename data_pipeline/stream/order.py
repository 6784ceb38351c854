"""The order of shards, documents and sequences in an epoch.

It is a function of (seed, epoch) and the shards' token counts, with random access: a position is found by binary search
in prefix sums over the shards.
"""

import functools
import hashlib

import numpy as np


def permutation(length: int, *key: int | str) -> np.ndarray:
    """A permutation of range(length), int64 [length], that depends only on `key`.

    Computed by sorting raw Philox output, which numpy keeps stable between versions, unlike its shuffles: a run must
    resume with a later numpy.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    bits = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(length)
    return np.argsort(bits, kind="stable")


class EpochOrder:
    """One epoch of sequences over shards that hold `shard_tokens` [shards] tokens.

    Shards are permuted, their documents concatenated (in an order that the shard's reader permutes), and the result cut
    into sequences of `sequence_length` + 1 tokens with stride `sequence_length`. Sequences are permuted within windows
    of `window` consecutive shards, so that a batch does not hold consecutive text. Memory: two numbers per shard, plus
    one per sequence of the windows in use. `key` distinguishes groups of shards.
    """

    def __init__(
        self,
        shard_tokens: np.ndarray,
        *,
        sequence_length: int,
        seed: int,
        epoch: int,
        window: int,
        key: tuple[str, ...],
    ):
        window = min(window, len(shard_tokens))
        self.shards = permutation(len(shard_tokens), seed, epoch, "shards", *key)
        self.ends = np.cumsum(shard_tokens[self.shards])  # [shards]: cumulative tokens, in epoch order
        self.tokens = int(self.ends[-1])
        self.sequences = sequences_per_epoch(self.tokens, sequence_length)
        closing = np.minimum(np.arange(window, len(shard_tokens) + window, window), len(shard_tokens)) - 1
        # A sequence belongs to the window in which its first token lies.
        self._window_ends = np.minimum(-(-self.ends[closing] // sequence_length), self.sequences)
        # Per instance, because a cache on the function would keep every epoch alive.
        self._within_window = functools.lru_cache(maxsize=4)(
            lambda number, length: permutation(length, seed, epoch, "window", number, *key)
        )

    def sequence(self, position: int) -> int:
        """Index, in text order, of the sequence at `position` in training order; both in [0, sequences)."""
        window = int(np.searchsorted(self._window_ends, position, side="right"))
        first = int(self._window_ends[window - 1]) if window else 0
        return first + int(self._within_window(window, int(self._window_ends[window]) - first)[position - first])


def sequences_per_epoch(tokens: int, sequence_length: int) -> int:
    """Number of sequences that cover `tokens` so that each token but the first is a target once."""
    return -(-(tokens - 1) // sequence_length)
