"""Words that are real in an order that is not."""

import itertools
import re

from pydantic.dataclasses import dataclass

from data_pipeline.filters.base import RULE, Drop, Share
from data_pipeline.sources import Positive

# A full stop alone: after "O night!" or "Come!" a verse or a speaker goes on in lower case.
ENDS = re.compile(r"[^\W\d_]{3,}\.[\"')\]”’]*$|^\.$")  # noqa: RUF001  (typographic quotes are meant)
LAST = frozenset(".\"')]”’")  # noqa: RUF001  (what ENDS ends in: asking first is cheaper)
# After these articles comes a noun or what describes one, and never one of those.
ARTICLES = frozenset(("the", "an"))
NEVER_NEXT = frozenset(re.findall(r"\w+", "the a an of and to in is was are were with by from for at that it be or"))


@dataclass(frozen=True, config=RULE)
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


@dataclass(frozen=True, config=RULE)
class WordOrder:
    """Pairs of words that English never has, such as `the of`: share of all pairs, at most, once there are `min_pairs`
    of them. Catches shuffled words where there is no punctuation to tell."""

    max_share: Share = 0.004
    min_pairs: Positive = 3
    languages: tuple[str, ...] = ("en",)

    def __call__(self, text: str) -> Drop | None:
        words = text.lower().split()
        pairs = sum(first in ARTICLES and second in NEVER_NEXT for first, second in itertools.pairwise(words))
        if pairs < self.min_pairs:
            return None
        share = pairs / len(words)
        return Drop("max_share", share, self.max_share) if share > self.max_share else None
