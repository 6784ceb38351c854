"""Whether the words are those of people, in the spirit of Gopher's rules (arXiv 2112.11446)."""

import re

from pydantic.dataclasses import dataclass

from data_pipeline.filters.base import Drop, rule
from data_pipeline.letters import plain, spaceless
from data_pipeline.thresholds import STRICT, Amount, Positive, Share, ordered

WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")  # noqa: RUF001  (the typographic apostrophe is meant)


@rule("words", place=90)
@dataclass(frozen=True, config=STRICT)
class Words:
    """`min_words`, `max_words`: how many; `min_mean_length`, `max_mean_length`: letters a word; `min_alphabetic`: share
    of words and numbers that has a letter. Not asked of text that is mostly in a script without spaces.

    The mean is over words in Latin, Greek, Cyrillic and Armenian letters, and asked where they are half of all words or
    more: where a letter is a syllable (Hangul, Ethiopic, Devanagari), words are half as long.
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
        text = plain(text)
        words = WORD.findall(text)
        if len(words) < self.min_words:
            return Drop("min_words", len(words), self.min_words)
        if len(words) > self.max_words:
            return Drop("max_words", len(words), self.max_words)
        alphabetic = words if text.isascii() else list(filter(_is_alphabetic, words))
        if len(alphabetic) >= len(words) / 2:
            mean = sum(map(len, alphabetic)) / len(alphabetic)
            if mean < self.min_mean_length:
                return Drop("min_mean_length", mean, self.min_mean_length)
            if mean > self.max_mean_length:
                return Drop("max_mean_length", mean, self.max_mean_length)
        pieces = [piece for piece in text.split() if any(map(str.isalnum, piece))]
        share = sum(any(map(str.isalpha, piece)) for piece in pieces) / len(pieces)
        return Drop("min_alphabetic", share, self.min_alphabetic) if share < self.min_alphabetic else None


def _is_alphabetic(word: str) -> bool:
    return word[0] < "\u0590" or "\u1d00" <= word[0] < "\u2000"
