"""Whether the words are those of people, in the spirit of Gopher's rules (arXiv 2112.11446)."""

import re

from pydantic.dataclasses import dataclass

from data_pipeline.filters.base import Drop, rule
from data_pipeline.thresholds import STRICT, Amount, Positive, Share, ordered

WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")  # noqa: RUF001  (the typographic apostrophe is meant)
# Scripts that put no spaces between words: of what stands between spaces, nothing follows.
SPACELESS = re.compile(r"[\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")


@rule("words", place=90)
@dataclass(frozen=True, config=STRICT)
class Words:
    """`min_words`, `max_words`: how many; `min_mean_length`, `max_mean_length`: characters a word; `min_alphabetic`:
    share of words and numbers that has a letter. Not asked of text that is mostly in a script without
    spaces."""

    min_words: Positive = 10
    max_words: Positive = 1_000_000
    min_mean_length: Amount = 2.5
    max_mean_length: Amount = 12.0
    min_alphabetic: Share = 0.5

    def __post_init__(self):
        ordered(self, "min_words", "max_words")
        ordered(self, "min_mean_length", "max_mean_length")

    def __call__(self, text: str) -> Drop | None:
        if len(SPACELESS.findall(text)) > len(text) / 4:
            return None
        words = WORD.findall(text)
        if len(words) < self.min_words:
            return Drop("min_words", len(words), self.min_words)
        if len(words) > self.max_words:
            return Drop("max_words", len(words), self.max_words)
        mean = sum(map(len, words)) / len(words)
        if mean < self.min_mean_length:
            return Drop("min_mean_length", mean, self.min_mean_length)
        if mean > self.max_mean_length:
            return Drop("max_mean_length", mean, self.max_mean_length)
        pieces = [piece for piece in text.split() if any(map(str.isalnum, piece))]
        share = sum(any(map(str.isalpha, piece)) for piece in pieces) / len(pieces)
        return Drop("min_alphabetic", share, self.min_alphabetic) if share < self.min_alphabetic else None
