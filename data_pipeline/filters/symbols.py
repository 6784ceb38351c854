"""Text with too many symbols or too few letters."""

import numpy as np
from pydantic.dataclasses import dataclass

from data_pipeline.filters.base import Drop, rule
from data_pipeline.measures import LETTER, SPACE, SYMBOL, Characters, characters
from data_pipeline.thresholds import STRICT, Share


@rule("symbols", place=20, on=True)
@dataclass(frozen=True, config=STRICT)
class Symbols:
    """`max_symbols`, `min_letters`: shares of symbols and of letters among the characters other than white space. A
    letter with its combining marks counts as one character, as does a ruler or table border (one symbol, four or more
    times).

    Prose has about 0.05 symbols and 0.95 letters, Python source 0.2 and 0.7; a table of numbers has few letters, a line
    drawing many symbols.
    """

    max_symbols: Share = 0.5
    min_letters: Share = 0.3

    def __call__(self, text: str) -> Drop | None:
        found = characters(text)
        in_rulers = _in_rulers(found)
        visible = max(len(found.kinds) - found.count(SPACE) - in_rulers, 1)
        symbols = (found.count(SYMBOL) - in_rulers) / visible
        if symbols > self.max_symbols:
            return Drop("max_symbols", symbols, self.max_symbols)
        letters = found.count(LETTER) / visible
        return Drop("min_letters", letters, self.min_letters) if letters < self.min_letters else None


def _in_rulers(found: Characters) -> int:
    """Number of symbols in rulers (four or more equal symbols) that do not count: all but one per ruler."""
    again = (found.codes[1:] == found.codes[:-1]) & found.are(SYMBOL)[1:]
    if not (again[2:] & again[1:-1] & again[:-2]).any():
        return 0
    bounds = np.flatnonzero(np.diff(again, prepend=False, append=False))
    lengths = bounds[1::2] - bounds[::2]
    return int(lengths[lengths >= 3].sum())
