"""Random keystrokes."""

import itertools
import re
import unicodedata

from pydantic.dataclasses import dataclass

from data_pipeline.filters.base import Drop, rule
from data_pipeline.letters import plain
from data_pipeline.measures import word_counts
from data_pipeline.thresholds import STRICT, Positive, Share

# Vowels and their accented forms, up to U+017F.
ACCENTED = [c for c in map(chr, range(0xDF, 0x180)) if unicodedata.normalize("NFD", c)[0] in "aeiouy"]
VOWELS = "aeiouyæøœ\u0131" + "".join(ACCENTED)
LATIN = re.compile(r"[\"'(\u201c\u2018]?([a-z\u00df-\u00ff\u0101-\u017e]{4,})[.,;:!?\"')\u201d\u2019]*")
UNSPEAKABLE = re.compile(rf"[^{VOWELS}]{{5,}}|^[^{VOWELS}]+$")

PLAUSIBLE, IMPLAUSIBLE = 1, 2
MOST_WORDS = 1 << 18  # words in the cache of kinds


@rule("keyboard", place=100)
@dataclass(frozen=True, config=STRICT)
class Keyboard:
    """Maximum share of unpronounceable words among lower-case Latin words of four letters or more: without a vowel, or
    with five consonants in a row. Words in code or addresses are not counted; texts with fewer than `min_words` are
    kept."""

    max_share: Share = 0.15
    min_words: Positive = 15

    def __call__(self, text: str) -> Drop | None:
        counts = word_counts(plain(text))
        found = list(map(_kinds.__getitem__, counts))
        words = sum(itertools.compress(counts.values(), found))
        if words < self.min_words:
            return None
        pairs = zip(counts.values(), found, strict=True)
        share = sum(count for count, kind in pairs if kind == IMPLAUSIBLE) / words if IMPLAUSIBLE in found else 0.0
        return Drop("max_share", share, self.max_share) if share > self.max_share else None


class _Kinds(dict):
    """Cache {word: PLAUSIBLE, IMPLAUSIBLE, or 0 for a word that is not counted}."""

    def __missing__(self, word: str) -> int:
        if len(self) > MOST_WORDS:
            self.clear()
        latin = LATIN.fullmatch(word)
        self[word] = kind = (IMPLAUSIBLE if UNSPEAKABLE.search(latin[1]) else PLAUSIBLE) if latin else 0
        return kind


_kinds = _Kinds()
