"""Sentences that break off: full stops followed by lower case, as in shuffled words."""

import itertools
import re

from pydantic.dataclasses import dataclass

from data_pipeline.filters.base import Drop, rule
from data_pipeline.letters import plain
from data_pipeline.thresholds import STRICT, Positive, Share

# A full stop alone: after "O night!" or "Come!" a verse or a speaker goes on in lower case.
ENDS = re.compile(r"[^\W\d_]{3,}\.[\"')\]”’]*$|^\.$")  # noqa: RUF001  (typographic quotes are meant)
LAST = frozenset(".\"')]”’")  # noqa: RUF001  (what ENDS ends in: asking first is cheaper)


@rule("broken_sentences", place=110)
@dataclass(frozen=True, config=STRICT)
class BrokenSentences:
    """Share of full stops within a line that a lower-case word follows, in texts of `min_sentences` or more: real
    text has few (abbreviations), shuffled words have most. Asked of text written with capitals: of at least one
    capitalised word for two full stops."""

    max_share: Share = 0.5
    min_sentences: Positive = 4

    def __call__(self, text: str) -> Drop | None:
        lines = [line.split() for line in plain(text).splitlines()]
        pairs = itertools.chain.from_iterable(map(itertools.pairwise, lines))
        following = [after for word, after in pairs if word[-1] in LAST and ENDS.search(word)]
        if len(following) < self.min_sentences:
            return None
        share = sum(_is_lower(word[0]) for word in following) / len(following)
        if share <= self.max_share or 2 * sum(word[0].isupper() for line in lines for word in line) < len(following):
            return None
        return Drop("max_share", share, self.max_share)


def _is_lower(letter: str) -> bool:
    """Whether a letter would be a capital at the beginning of a sentence: no Georgian one would."""
    return letter.islower() and letter.title() != letter
