"""Lists of key words and tables of names: text without stop words."""

from pydantic.dataclasses import dataclass

from data_pipeline.filters.base import Drop, rule
from data_pipeline.measures import in_any_case, word_counts, words
from data_pipeline.thresholds import STRICT, Count

STOP_WORDS = in_any_case("the be to of and that have with is in it for on was are as this not or a")


@rule("stop_words", place=130)
@dataclass(frozen=True, config=STRICT)
class StopWords:
    """Minimum number of distinct stop words, in texts of at least `min_words` words in `languages`."""

    min_different: Count = 2
    min_words: Count = 50
    languages: tuple[str, ...] = ("en",)

    def __call__(self, text: str) -> Drop | None:
        if len(words(text)) < self.min_words:
            return None
        different = len(set(map(str.lower, STOP_WORDS & word_counts(text).keys())))
        return Drop("min_different", different, self.min_different) if different < self.min_different else None
