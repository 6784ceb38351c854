"""Web page boilerplate: sentences and menu entries that many pages share."""

import functools
import re

from pydantic.dataclasses import dataclass

from data_pipeline.filters.base import Drop, rule
from data_pipeline.measures import lower, may_have
from data_pipeline.thresholds import STRICT, Phrases, Share

PHRASES = (
    "cookie",
    "privacy policy",
    "terms of use",
    "terms of service",
    "terms and conditions",
    "all rights reserved",
    "newsletter",
    "sign in",
    "sign up",
    "log in",
    "click here",
    "accept all",
    "enable javascript",
    "lorem ipsum",
    "skip to content",
    "skip to main content",
    "add to cart",
    "shopping cart",
    "share on",
    "follow us",
    "powered by",
    "contact us",
    "about us",
    "your browser",
    "back to top",
    "site map",
    "forgot your password",
)
UNIT = re.compile(r"[\n|•·»]+|(?<=[.!?])\s+")


@rule("boilerplate", place=60)
@dataclass(frozen=True, config=STRICT)
class Boilerplate:
    """Maximum share of characters in sentences or menu entries with one of the `phrases` (in lower case)."""

    max_share: Share = 0.3
    phrases: Phrases = PHRASES

    def __call__(self, text: str) -> Drop | None:
        pattern = _pattern(self.phrases)
        if not may_have(text, self.phrases) or not pattern.search(lower(text)):
            return None
        units = [unit for unit in UNIT.split(lower(text)) if unit and not unit.isspace()]
        share = sum(len(unit) for unit in units if pattern.search(unit)) / max(sum(map(len, units)), 1)
        return Drop("max_share", share, self.max_share) if share > self.max_share else None


@functools.cache
def _pattern(phrases: tuple[str, ...]) -> re.Pattern:
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, phrases))})")
