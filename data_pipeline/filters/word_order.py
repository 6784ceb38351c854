"""Word pairs impossible in English, as in shuffled words without punctuation."""

import itertools

from pydantic.dataclasses import dataclass

from data_pipeline.filters.base import Drop, rule
from data_pipeline.measures import in_any_case, words
from data_pipeline.thresholds import STRICT, Positive, Share

# An article is followed by a noun or its modifier, never by one of the words below.
ARTICLES = in_any_case("the an")
NEVER_NEXT = in_any_case("the a an of and to in is was are were with by from for at that it be or")


@rule("word_order", place=140)
@dataclass(frozen=True, config=STRICT)
class WordOrder:
    """Maximum share of word pairs that English never has, such as `the of`, once there are `min_pairs` of them. Finds
    shuffled words in text without punctuation."""

    max_share: Share = 0.004
    min_pairs: Positive = 3
    languages: tuple[str, ...] = ("en",)

    def __call__(self, text: str) -> Drop | None:
        found = words(text)
        after_articles = itertools.compress(found[1:], map(ARTICLES.__contains__, found))
        pairs = sum(map(NEVER_NEXT.__contains__, after_articles))
        if pairs < self.min_pairs:
            return None
        share = pairs / len(found)
        return Drop("max_share", share, self.max_share) if share > self.max_share else None
