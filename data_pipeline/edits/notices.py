"""Removes web page notices: cookie banners, terms, requests to enable JavaScript."""

import functools
import re

from pydantic.dataclasses import dataclass

from data_pipeline.edits.base import Edit, edit
from data_pipeline.letters import SPACELESS, count_words
from data_pipeline.measures import may_have
from data_pipeline.protected import masked
from data_pipeline.thresholds import STRICT, Count, Phrases

# C4's phrases (arXiv 1910.10683), but not the single word `javascript`, which would remove lines about the language.
PHRASES = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "use cookies",
    "uses cookies",
    "use of cookies",
    "enable javascript",
    "activate javascript",
    "turn on javascript",
    "requires javascript",
    "without javascript",
    "javascript enabled",
    "javascript to be enabled",
    "javascript must be enabled",
    "javascript is required",
    "javascript is disabled",
    "javascript is not enabled",
    "javascript is turned off",
    "javascript has been disabled",
)


@edit("notices")
@dataclass(frozen=True, config=STRICT)
class Notices:
    """Removes lines of at most `max_words` words with one of the `phrases` (in lower case), if there are more than
    `max_count` such lines. Lines within a wrapped paragraph stay, as do lines with code, a formula or a Markdown
    link."""

    max_count: Count = 0
    max_words: Count = 40
    phrases: Phrases = PHRASES

    def __call__(self, text: str) -> Edit | None:
        if not may_have(text, self.phrases) or not _pattern(self.phrases).search(text.lower()):
            return None
        lines = text.split("\n")
        seen = masked(text).split("\n")
        following = [*seen[1:], ""]
        kept = [line for line, *pair in zip(lines, seen, following, strict=True) if not self._is_notice(*pair)]
        count = len(lines) - len(kept)
        return Edit("notices", count, self.max_count, "\n".join(kept)) if count > self.max_count else None

    def _is_notice(self, line: str, following: str) -> bool:
        """Whether `line` is boilerplate such as a cookie or copyright notice: it holds one of `phrases`, at most
        `max_words` words, and is not part of a wrapped sentence. Protected characters are NUL. following: the next
        line."""
        wrapped = line.lstrip()[:1].islower() or following.lstrip()[:1].islower()
        found = not wrapped and "\0" not in line and _pattern(self.phrases).search(line.lower())
        return bool(found) and count_words(line) <= self.max_words


@functools.cache
def _pattern(phrases: tuple[str, ...]) -> re.Pattern:
    """A pattern of any of the phrases, as whole words; letters of scripts without spaces may be adjacent."""
    whole = "|".join(map(re.escape, phrases))
    return re.compile(rf"(?:\b|(?<=[{SPACELESS}]))(?:{whole})(?:\b|(?=[{SPACELESS}]))")
