"""Number of words, their length, and share of words with letters, after Gopher's rules (arXiv 2112.11446)."""

import re

import numpy as np
from pydantic.dataclasses import dataclass

from data_pipeline.filters.base import Drop, rule
from data_pipeline.letters import plain, spaceless
from data_pipeline.measures import ALPHA, DIGIT, LETTER, SPACE, Characters, characters
from data_pipeline.thresholds import STRICT, Amount, Positive, Share, ordered

WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")  # noqa: RUF001  (the typographic apostrophe is meant)

JOINERS = np.array([ord(mark) for mark in "'’-"], np.uint32)  # noqa: RUF001


@rule("words", place=90)
@dataclass(frozen=True, config=STRICT)
class Words:
    """`min_words`, `max_words`: number of words; `min_mean_length`, `max_mean_length`: letters per word;
    `min_alphabetic`: share of words and numbers with a letter. Not applied to text mostly in scripts without spaces.

    The mean is over words in Latin, Greek, Cyrillic and Armenian letters, and checked if they are at least half of all
    words: in syllabic scripts (Hangul, Ethiopic, Devanagari) words have half as many letters.
    """

    min_words: Positive = 10
    max_words: Positive = 1_000_000
    min_mean_length: Amount = 2.5
    max_mean_length: Amount = 16.0  # Greenlandic has 15
    min_alphabetic: Share = 0.5

    def __post_init__(self):
        ordered(self, "min_words", "max_words")
        ordered(self, "min_mean_length", "max_mean_length")

    def __call__(self, text: str) -> Drop | None:
        if spaceless(text) > len(text) / 4:
            return None
        found = characters(text)
        count, alphabetic, letters = _count_words(found, text)
        if count < self.min_words:
            return Drop("min_words", count, self.min_words)
        if count > self.max_words:
            return Drop("max_words", count, self.max_words)
        if alphabetic >= count / 2:
            mean = letters / alphabetic
            if mean < self.min_mean_length:
                return Drop("min_mean_length", mean, self.min_mean_length)
            if mean > self.max_mean_length:
                return Drop("max_mean_length", mean, self.max_mean_length)
        share = _pieces_with(found, ALPHA) / _pieces_with(found, LETTER | DIGIT)
        return Drop("min_alphabetic", share, self.min_alphabetic) if share < self.min_alphabetic else None


def _count_words(found: Characters, text: str) -> tuple[int, int, int]:
    """(Matches of WORD, those in alphabetic scripts, characters of the latter)."""
    letters = found.are(LETTER)
    of_letters = found.codes[letters]
    if len(of_letters) and found.codes.dtype != np.uint8 and not _alphabetic(of_letters).all():
        words = WORD.findall(plain(text))
        alphabetic = [word for word in words if _alphabetic(ord(word[0]))]
        return len(words), len(alphabetic), sum(map(len, alphabetic))
    runs = np.count_nonzero(letters[:1]) + np.count_nonzero(letters[1:] & ~letters[:-1])
    between = found.codes[1:-1][letters[:-2] & ~letters[1:-1] & letters[2:]]  # one character between two letters
    joints = np.count_nonzero(np.isin(between, JOINERS))
    return runs - joints, runs - joints, len(of_letters) + joints


def _alphabetic(code):
    """Whether letters, given as code points, belong to an alphabet with capitals."""
    return (code < 0x590) | ((code >= 0x1D00) & (code < 0x2000))


def _pieces_with(found: Characters, kind: int) -> int:
    """Number of white-space-separated pieces that have a character of this kind."""
    there = found.are(kind)[found.are(kind | SPACE)]  # white space left in as False
    return np.count_nonzero(there[:1]) + np.count_nonzero(there[1:] & ~there[:-1])
