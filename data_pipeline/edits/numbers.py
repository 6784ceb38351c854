"""Digits, groups of thousands and minus signs in one standard form."""

import re

from pydantic.dataclasses import dataclass

from data_pipeline.edits.base import Edit, edit, substitute
from data_pipeline.letters import SPACELESS
from data_pipeline.thresholds import STRICT, Count

WIDE = re.compile("[\uff10-\uff19\uff21-\uff3a\uff41-\uff5a]")  # full-width digits and letters
APOSTROPHE = re.compile(r"'\d{3}")  # a group of thousands, as in 1'000: all that ASCII text can have to change
GROUPED = re.compile("(?<![\\d.,])\\d{1,3}(?:['\u2019]\\d{3})+(?![\\d'\u2019])")
# A sign only after a space, a bracket, or a letter of a script without spaces; in `n\u22121` it is a subtraction.
MINUS = re.compile(f"(?<![^\\s(\\[\uff08\u3000-\u303f{SPACELESS}])\u2212(?=\\d)")


@edit("numbers")
@dataclass(frozen=True, config=STRICT)
class Numbers:
    """Standardises numbers if more than `max_count` places would change: full-width digits and letters to ASCII,
    apostrophes between groups of thousands to commas, the minus sign to a hyphen."""

    max_count: Count = 0

    def __call__(self, text: str) -> Edit | None:
        if text.isascii() and not APOSTROPHE.search(text):
            return None
        changed, wide = substitute(WIDE, lambda match: chr(ord(match.group()) - 0xFEE0), text)
        changed, grouped = substitute(GROUPED, lambda match: re.sub("['\u2019]", ",", match.group()), changed)
        changed, minus = substitute(MINUS, "-", changed)
        count = wide + grouped + minus
        return Edit("number_formats", count, self.max_count, changed) if count > self.max_count else None
