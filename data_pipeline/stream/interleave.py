"""Which group of the mixture each sample comes from, found at once for any position."""

import functools

import numpy as np

from data_pipeline.stream.order import permutation

BLOCK = 1024  # samples within which the mixture is exact to one sample of each group, and in random order


class Interleave:
    """Spreads `samples` [groups] evenly over an epoch of their sum.

    The epoch is cut into blocks; before block b stand floor(b * n / blocks) samples of a group that has n, so the
    place of any block, and of any group's samples within it, follows from b alone.
    """

    def __init__(self, samples: list[int], *, seed: int):
        self.samples = samples
        self.total = sum(samples)
        self.blocks = -(-self.total // BLOCK)
        self.seed = seed
        # Bound per instance: a cache on the method would keep every stream alive.
        self._block = functools.lru_cache(maxsize=8)(self._make_block)

    def locate(self, index: int) -> tuple[int, int]:
        """Global sample `index` -> its group, and which of all the group's samples, over all epochs, it is."""
        epoch, position = divmod(index, self.total)
        block = position * self.blocks // self.total
        while sum(self._before(block + 1)) <= position:  # rounding down puts a block's start at most a few before
            block += 1
        before = self._before(block)
        labels, ranks = self._block(epoch, block)
        place = position - sum(before)
        group = int(labels[place])
        return group, epoch * self.samples[group] + before[group] + int(ranks[place])

    def _before(self, block: int) -> list[int]:
        """How many samples of each group stand before a block."""
        return [block * samples // self.blocks for samples in self.samples]

    def _make_block(self, epoch: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The group of each place of a block, and its rank among that group's places there; both int64 [places]."""
        counts = np.subtract(self._before(block + 1), self._before(block))
        labels = np.repeat(np.arange(len(counts)), counts)
        labels = labels[permutation(len(labels), self.seed, epoch, "mixture", block)]
        ranks = np.empty_like(labels)
        for group, count in enumerate(counts):
            ranks[labels == group] = np.arange(count)
        return labels, ranks
