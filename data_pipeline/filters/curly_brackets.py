"""Style sheets, scripts and templates extracted as text."""

import re

from pydantic.dataclasses import dataclass

from data_pipeline.filters.base import Drop, rule
from data_pipeline.letters import count_words
from data_pipeline.protected import without_protected
from data_pipeline.thresholds import STRICT, Amount

LATEX_ARGUMENT = re.compile(r"\\[A-Za-z]+\*?(?:\[[^\]\n]*\])?\{|[\^_}]\{")


@rule("curly_brackets", place=80)
@dataclass(frozen=True, config=STRICT)
class CurlyBrackets:
    """Maximum number of opening curly brackets per word, outside code, formulas and LaTeX arguments; exceeded by style
    sheets, scripts and templates. C4 drops pages with any, including pages that quote code."""

    max_per_word: Amount = 0.1

    def __call__(self, text: str) -> Drop | None:
        if "{" not in text or text.count("{") <= self.max_per_word * count_words(text):
            return None
        prose = without_protected(text)
        share = (prose.count("{") - len(LATEX_ARGUMENT.findall(prose))) / max(count_words(prose), 1)
        return Drop("max_per_word", share, self.max_per_word) if share > self.max_per_word else None
