"""Shortens repeated punctuation."""

import functools
import re

from pydantic.dataclasses import dataclass

from data_pipeline.edits.base import Edit, edit, substitute
from data_pipeline.thresholds import STRICT, Positive

# Marks within and at the end of sentences: ASCII and European, full-width, of Arabic and Hebrew, of Armenian, of Indic
# scripts, of Ethiopic, of Burmese, Khmer and Tibetan.
MARKS = "!?,;:.…~¡¿" + "。，！？、；：～｡､" + "؟،؛۔׃" + "՞՜։" + "।॥" + "።፣፤፥፧፨" + "။၊។៕།"  # noqa: RUF001


@functools.cache
def _runs(longest: int) -> re.Pattern:
    return re.compile(rf"([{MARKS}])\1{{{longest},}}")


@edit("punctuation")
@dataclass(frozen=True, config=STRICT)
class Punctuation:
    """Shortens a run of more than `max_run` equal marks to one mark, full stops to three. Markdown's rules and markers
    use other characters."""

    max_run: Positive = 3

    def __call__(self, text: str) -> Edit | None:
        if not any(mark * (self.max_run + 1) in text for mark in MARKS):
            return None
        runs = _runs(self.max_run)
        longest = max((len(match.group()) for match in runs.finditer(text)), default=0)
        changed, _ = substitute(runs, lambda match: "..." if match[1] == "." else match[1], text)
        return Edit("longest_run", longest, self.max_run, changed) if changed != text else None
