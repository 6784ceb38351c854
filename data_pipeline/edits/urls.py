"""Addresses on the web: no model learns them, and all are alike."""

import re

from pydantic.dataclasses import dataclass

from data_pipeline.edits.base import Edit, edit, substitute
from data_pipeline.thresholds import STRICT, Count

STOPS = r"\s<>\"'`\])}\uff0c\u3002\u3001\uff09\u3011"  # what ends an address, full-width marks included
URL = re.compile(rf" ?[<(\[]?(?<![A-Za-z0-9])(?:(?:https?|ftp)://|www\.)[^{STOPS}]*[^{STOPS}.,;:!?][>)\]]?")


@edit("urls")
@dataclass(frozen=True, config=STRICT)
class Urls:
    """Removes web addresses when there are more than `max_count`. The targets of Markdown links stay, and so do those
    in code."""

    max_count: Count = 0

    def __call__(self, text: str) -> Edit | None:
        changed, count = substitute(URL, "", text)
        return Edit("urls", count, self.max_count, changed) if count > self.max_count else None
