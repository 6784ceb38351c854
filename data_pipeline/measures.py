"""Measures of a text that several rules share: its lines, words and kinds of characters.

Each is cached for the last text: all rules are applied to one document before the next.
"""

import functools
import itertools
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

from data_pipeline.letters import plain

LETTER, DIGIT, SYMBOL, SPACE, ALPHA = 1, 2, 4, 8, 16  # bits of a character's kind
LIMIT = 0x110000  # number of code points
# As in the rules' patterns: a letter is alphanumeric and not a decimal digit.
PATTERNS = {LETTER: r"[^\W\d_]+", DIGIT: r"\d+", SYMBOL: r"(?:[^\w\s]|_)+", SPACE: r"\s+"}
of_one_text = functools.lru_cache(maxsize=1)


@functools.cache
def kinds() -> np.ndarray:
    """The kind of each code point, uint8 [LIMIT]."""
    characters = "".join(map(chr, range(LIMIT)))
    table = np.zeros(LIMIT, np.uint8)
    for kind, pattern in PATTERNS.items():
        for match in re.finditer(pattern, characters):
            table[match.start() : match.end()] |= kind
    table |= np.fromiter(map(str.isalpha, characters), bool, LIMIT).astype(np.uint8) * np.uint8(ALPHA)
    return table


@dataclass(frozen=True)
class Characters:
    """The characters of `plain(text)`: `codes` (uint8 where all are ASCII, else uint32) and `kinds` (uint8), [n]."""

    codes: np.ndarray
    kinds: np.ndarray

    def count(self, kind: int) -> int:
        """Number of characters of this kind."""
        return np.count_nonzero(self.kinds & kind)

    def are(self, kind: int) -> np.ndarray:
        """bool [n]: characters of this kind, or of any of several or-ed kinds."""
        return (self.kinds & kind) != 0


@of_one_text
def characters(text: str) -> Characters:
    text = plain(text)
    if text.isascii():
        codes = np.frombuffer(text.encode(), np.uint8)
    else:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.dtype("<u4"))
    return Characters(codes, kinds()[codes])


@of_one_text
def lines(text: str) -> list[str]:
    """The lines that are not blank."""
    return [line for line in text.splitlines() if not line.isspace() and line]


@of_one_text
def lower(text: str) -> str:
    return text.lower()


@of_one_text
def words(text: str) -> list[str]:
    """The text split at white space."""
    return text.split()


@of_one_text
def word_counts(text: str) -> Counter[str]:
    """{word: number of occurrences}."""
    return Counter(words(text))


@of_one_text
def vocabulary(text: str) -> str:
    """The distinct words in lower case, joined by spaces, for fast negative searches."""
    return " ".join(word_counts(text)).lower()


def in_any_case(text: str) -> frozenset[str]:
    """All upper- and lower-case spellings of the words, in ASCII, of a text."""
    ways = (itertools.product(*({letter, letter.upper()} for letter in word)) for word in text.split())
    return frozenset(map("".join, itertools.chain.from_iterable(ways)))


def may_have(text: str, phrases: tuple[str, ...]) -> bool:
    """Whether any of the lower-case phrases is in the text, ignoring the text's case."""
    there = vocabulary(text)
    likely = [phrase for phrase, needle in zip(phrases, needles(phrases), strict=True) if needle in there]
    return bool(likely) and any(phrase in lower(text) for phrase in likely)


@functools.cache
def needles(phrases: tuple[str, ...]) -> tuple[str, ...]:
    """The longest word of each phrase, which is in the vocabulary of every text with the phrase."""
    return tuple(max(phrase.split(), key=len) for phrase in phrases)
