"""Pages that are not written yet, and what a page is built with instead of what it says."""

import re

from pydantic.dataclasses import dataclass

from data_pipeline.filters.base import RULE, Amount, Drop, Phrases
from data_pipeline.protected import PROTECTED
from data_pipeline.sources import Count

LATEX_ARGUMENT = re.compile(r"\\[A-Za-z]+\*?(?:\[[^\]\n]*\])?\{|[\^_}]\{")


@dataclass(frozen=True, config=RULE)
class Placeholder:
    """How often one of the `phrases` (in lower case) is there, at most, code aside: C4 drops pages with any."""

    max_count: Count = 0
    phrases: Phrases = ("lorem ipsum",)

    def __call__(self, text: str) -> Drop | None:
        if not self._count(text):
            return None
        count = self._count(PROTECTED.sub(" ", text))
        return Drop("max_count", count, self.max_count) if count > self.max_count else None

    def _count(self, text: str) -> int:
        lower = text.lower()
        return sum(map(lower.count, self.phrases))


@dataclass(frozen=True, config=RULE)
class CurlyBrackets:
    """Opening curly brackets a word, at most, outside code, formulas and the arguments of LaTeX: style sheets, scripts
    and templates that were taken for text have more. C4 drops pages with any, those that quote code among them."""

    max_per_word: Amount = 0.1

    def __call__(self, text: str) -> Drop | None:
        if text.count("{") <= self.max_per_word * len(text.split()):
            return None
        prose = PROTECTED.sub(" ", text)
        share = (prose.count("{") - len(LATEX_ARGUMENT.findall(prose))) / max(len(prose.split()), 1)
        return Drop("max_per_word", share, self.max_per_word) if share > self.max_per_word else None
