"""Repeated lines, phrases and passages."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from pydantic.dataclasses import dataclass

from data_pipeline.filters.base import Drop, rule
from data_pipeline.letters import plain
from data_pipeline.measures import lines, words
from data_pipeline.thresholds import STRICT, Count, Positive, Share

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, about half of its bits set


@rule("repetition", place=50, on=True)
@dataclass(frozen=True, config=STRICT)
class Repetition:
    """Maximum shares. `max_duplicate_lines`: characters in lines seen before in the document (lines of fewer than
    `shortest_line` characters do not count: code repeats `else:` and closing brackets). In texts of at least
    `min_words` words: `max_top_words`: words in the commonest n-gram of `words` words; `max_repeated_words`: words that
    end an n-gram of `run` words seen before (passages repeated with other line breaks). 1 turns a share off."""

    max_duplicate_lines: Share = 0.5
    shortest_line: Count = 12
    max_top_words: Share = 0.2
    words: Positive = 3
    max_repeated_words: Share = 1.0
    run: Positive = 10
    min_words: Count = 60

    def __call__(self, text: str) -> Drop | None:
        share = self._duplicate_lines(text)
        if share > self.max_duplicate_lines:
            return Drop("max_duplicate_lines", share, self.max_duplicate_lines)
        found = words(text)
        if len(found) < self.min_words:
            return None
        hashes = np.fromiter(map(hash, found), np.int64, len(found)).astype(np.uint64)
        for name, share in (("max_top_words", self._top_words), ("max_repeated_words", self._repeated_words)):
            most = getattr(self, name)
            # Equal n-grams have equal hashes, so the share by hashes is at least the share by words.
            if most < 1 and share(hashes, _hashed_runs) > most and (exact := share(found, _runs)) > most:
                return Drop(name, exact, most)
        return None

    def _duplicate_lines(self, text: str) -> float:
        size = len if plain(text) == text else _letters
        long = [line for raw in lines(text) if size(line := raw.strip()) >= self.shortest_line]
        different = set(long)
        if len(different) == len(long):
            return 0.0
        return 1 - sum(map(size, different)) / sum(map(size, long))

    def _top_words(self, found: Sequence, runs_of: Callable) -> float:
        if len(found) < self.words:
            return 0.0
        return int(runs_of(found, self.words).max()) * self.words / len(found)

    def _repeated_words(self, found: Sequence, runs_of: Callable) -> float:
        if len(found) < self.run:
            return 0.0
        return (len(found) - self.run + 1 - len(runs_of(found, self.run))) / len(found)


def _runs(found: list[str], length: int) -> np.ndarray:
    """Counts of the distinct n-grams of `length` words, int [distinct n-grams]."""
    return np.array(list(Counter(zip(*(found[start:] for start in range(length)), strict=False)).values()))


def _hashed_runs(hashes: np.ndarray, length: int) -> np.ndarray:
    """`_runs` of word hashes, uint64 [words]: an n-gram's hash is a polynomial of its words' hashes, modulo 2**64."""
    total = np.zeros(len(hashes) - length + 1, np.uint64)
    for start in range(length):
        total = total * MULTIPLIER + hashes[start : start + len(total)]
    total.sort()
    bounds = np.flatnonzero(total[1:] != total[:-1])
    return np.diff(bounds, prepend=-1, append=len(total) - 1)


def _letters(line: str) -> int:
    return len(plain(line))
