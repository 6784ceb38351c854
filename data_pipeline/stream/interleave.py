"""The mixture's map from a sample index to its group, in constant time."""

import functools

import numpy as np

from data_pipeline.stream.order import permutation

BLOCK = 1024  # samples per block; each block has the mixture's shares, up to one sample per group, in random order


class Interleave:
    """Spreads each group's samples evenly over an epoch. samples: [groups], their number per epoch.

    The epoch is cut into blocks; before block b there are floor(b * n / blocks) samples of a group with n samples, so
    the content of block b follows from b alone.
    """

    def __init__(self, samples: list[int], *, seed: int):
        self.samples = samples
        self.total = sum(samples)
        self.blocks = -(-self.total // BLOCK)
        self.seed = seed
        # Per instance, because a cache on the method would keep every instance alive.
        self._block = functools.lru_cache(maxsize=8)(self._make_block)

    def locate(self, index: int) -> tuple[int, int]:
        """Global sample `index` -> (group, index among the group's samples, over all epochs)."""
        epoch, position = divmod(index, self.total)
        block = position * self.blocks // self.total
        while sum(self._before(block + 1)) <= position:  # the estimate is at most a few blocks too low
            block += 1
        before = self._before(block)
        labels, ranks = self._block(epoch, block)
        place = position - sum(before)
        group = int(labels[place])
        return group, epoch * self.samples[group] + before[group] + int(ranks[place])

    def _before(self, block: int) -> list[int]:
        """Number of samples of each group before a block."""
        return [block * samples // self.blocks for samples in self.samples]

    def _make_block(self, epoch: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """For each sample of a block: group, and index among the group's samples in the block; int64 [samples] each."""
        counts = np.subtract(self._before(block + 1), self._before(block))
        labels = np.repeat(np.arange(len(counts)), counts)
        labels = labels[permutation(len(labels), self.seed, epoch, "mixture", block)]
        ranks = np.empty_like(labels)
        for group, count in enumerate(counts):
            ranks[labels == group] = np.arange(count)
        return labels, ranks
