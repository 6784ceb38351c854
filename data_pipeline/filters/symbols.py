"""Text that is mostly punctuation, or hardly contains a letter."""

import re

from pydantic.dataclasses import dataclass

from data_pipeline.filters.base import Drop, rule
from data_pipeline.letters import plain
from data_pipeline.thresholds import STRICT, Share

SYMBOLS = re.compile(r"(?:[^\w\s]|_)+")
RULERS = re.compile(r"([^\w\s]|_)\1{3,}")
LETTERS = re.compile(r"[^\W\d_]+")


@rule("symbols", place=20, on=True)
@dataclass(frozen=True, config=STRICT)
class Symbols:
    """`max_symbols`, `min_letters`: shares of symbols and of letters in the characters other than white space. A letter
    counts as one with its marks, and so does a ruler or the border of a table (one symbol four times or more).

    Prose has about 0.05 symbols and 0.95 letters, Python source 0.2 and 0.7; a table of numbers has few letters, a line
    drawing many symbols.
    """

    max_symbols: Share = 0.5
    min_letters: Share = 0.3

    def __call__(self, text: str) -> Drop | None:
        text = RULERS.sub(r"\1", plain(text))
        visible = max(len("".join(text.split())), 1)
        symbols = sum(map(len, SYMBOLS.findall(text))) / visible
        if symbols > self.max_symbols:
            return Drop("max_symbols", symbols, self.max_symbols)
        letters = sum(map(len, LETTERS.findall(text))) / visible
        return Drop("min_letters", letters, self.min_letters) if letters < self.min_letters else None
