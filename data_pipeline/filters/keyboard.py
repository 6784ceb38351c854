"""Fingers on a keyboard."""

import re
import unicodedata
from collections import Counter

from pydantic.dataclasses import dataclass

from data_pipeline.filters.base import Drop, rule
from data_pipeline.letters import plain
from data_pipeline.thresholds import STRICT, Positive, Share

# Vowels and their accented forms, up to U+017F.
ACCENTED = [c for c in map(chr, range(0xDF, 0x180)) if unicodedata.normalize("NFD", c)[0] in "aeiouy"]
VOWELS = "aeiouyæøœ\u0131" + "".join(ACCENTED)
LATIN = re.compile(r"(?<!\S)[\"'(\u201c\u2018]?([a-z\u00df-\u00ff\u0101-\u017e]{4,})[.,;:!?\"')\u201d\u2019]*(?!\S)")
IMPLAUSIBLE = re.compile(rf"[^{VOWELS}]{{5,}}|^[^{VOWELS}]+$")


@rule("keyboard", place=100)
@dataclass(frozen=True, config=STRICT)
class Keyboard:
    """Share of lower-case Latin words of four letters or more that nobody could speak: without a vowel, or with five
    consonants on end. Words inside code or an address do not stand alone and are not asked, nor are texts with fewer
    than `min_words`."""

    max_share: Share = 0.15
    min_words: Positive = 15

    def __call__(self, text: str) -> Drop | None:
        words = LATIN.findall(plain(text))
        if len(words) < self.min_words:
            return None
        share = sum(count for word, count in Counter(words).items() if IMPLAUSIBLE.search(word)) / len(words)
        return Drop("max_share", share, self.max_share) if share > self.max_share else None
