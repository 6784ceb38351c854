"""Text that no person wrote for another: page furniture and logs of machines."""

import functools
import re

from pydantic.dataclasses import dataclass

from data_pipeline.filters.base import RULE, Drop, Phrases, Share
from data_pipeline.sources import Positive

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
LOG_LINE = re.compile(
    r"\s*(?:\[?\d{4}[-/]\d\d[-/]\d\d[T ]\d\d:\d\d|[A-Z][a-z]{2} +\d{1,2} \d\d:\d\d:\d\d|\[? *\d+\.\d{3,}\]|"
    r"\d{1,3}(?:\.\d{1,3}){3} \S+ \S+ \[|\[?\d\d:\d\d:\d\d|\[?(?:DEBUG|INFO|WARN|WARNING|ERROR|FATAL|TRACE|CRITICAL)\b)"
)


@dataclass(frozen=True, config=RULE)
class Boilerplate:
    """Share of the characters that lie in sentences, or entries of menus, with one of the `phrases` (in lower case)."""

    max_share: Share = 0.3
    phrases: Phrases = PHRASES

    def __call__(self, text: str) -> Drop | None:
        pattern = _pattern(self.phrases)
        if not pattern.search(lower := text.lower()):
            return None
        units = [unit for unit in UNIT.split(lower) if unit and not unit.isspace()]
        share = sum(len(unit) for unit in units if pattern.search(unit)) / max(sum(map(len, units)), 1)
        return Drop("max_share", share, self.max_share) if share > self.max_share else None


@functools.cache
def _pattern(phrases: tuple[str, ...]) -> re.Pattern:
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, phrases))})")


@dataclass(frozen=True, config=RULE)
class Logs:
    """Share of lines that begin with a time stamp or a log level, in texts of `min_lines` lines or more."""

    max_share: Share = 0.5
    min_lines: Positive = 5

    def __call__(self, text: str) -> Drop | None:
        lines = [line for line in text.splitlines() if line.strip()]
        if len(lines) < self.min_lines:
            return None
        share = sum(LOG_LINE.match(line) is not None for line in lines) / len(lines)
        return Drop("max_share", share, self.max_share) if share > self.max_share else None
