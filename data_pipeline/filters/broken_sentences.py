"""Sentences that break off: full stops followed by lower case, as in shuffled words."""

import itertools
import re

from pydantic.dataclasses import dataclass

from data_pipeline.filters.base import Drop, rule
from data_pipeline.thresholds import STRICT, Positive, Share

# A full stop alone: after "O night!" or "Come!" a verse or a speaker goes on in lower case.
ENDS = re.compile(r"[^\W\d_]{3,}\.[\"')\]”’]*$|^\.$")  # noqa: RUF001  (typographic quotes are meant)
LAST = frozenset(".\"')]”’")  # noqa: RUF001  (what ENDS ends in: asking first is cheaper)


@rule("broken_sentences", place=110)
@dataclass(frozen=True, config=STRICT)
class BrokenSentences:
    """Share of full stops within a line that a lower-case word follows, in texts of `min_sentences` or more: real
    text has few (abbreviations), shuffled words have most. Holds for every script that has capitals."""

    max_share: Share = 0.5
    min_sentences: Positive = 4

    def __call__(self, text: str) -> Drop | None:
        lines = (itertools.pairwise(line.split()) for line in text.splitlines())
        pairs = itertools.chain.from_iterable(lines)
        following = [after for word, after in pairs if word[-1] in LAST and ENDS.search(word)]
        if len(following) < self.min_sentences:
            return None
        share = sum(word[0].islower() for word in following) / len(following)
        return Drop("max_share", share, self.max_share) if share > self.max_share else None
