"""Addresses on the web: no model learns them, and all are alike."""

import re

from pydantic.dataclasses import dataclass

from data_pipeline.edits.base import Edit, edit, substitute
from data_pipeline.letters import HANGUL, MARKS, SPACELESS
from data_pipeline.thresholds import STRICT, Count

# Of other letters than those of ASCII, an address has those of scripts with spaces: in the others the text goes on
# behind it without one, and so does a Korean particle.
LETTER = rf"(?![{SPACELESS}{HANGUL}])(?:[^\W\0-\x7f]|[{MARKS}])"
CHARACTER = rf"(?:[A-Za-z0-9\-._~:/?#@!$&*+,;=%|^\\{{]|{LETTER})"
LAST = rf"(?:[A-Za-z0-9\-_~/#@$&*+=%|^\\{{]|{LETTER})"  # what follows it is punctuation of the text
ADDRESS = rf"(?:(?i:https?|ftp)://|(?i:www)\.)(?:{CHARACTER}|\({CHARACTER}*\))*(?:{LAST}|\({CHARACTER}*\))"
BRACKETS = ("()", "[]", "<>", "\uff08\uff09", "\u3010\u3011")
URL = re.compile(
    "( ?)(?:"
    + "|".join(f"{re.escape(opening)}{ADDRESS}{re.escape(closing)}" for opening, closing in BRACKETS)
    + rf"|(?<![A-Za-z0-9]){ADDRESS})"
)


@edit("urls")
@dataclass(frozen=True, config=STRICT)
class Urls:
    """Removes web addresses when there are more than `max_count`, with brackets that hold nothing else and the space
    before, unless a letter follows. The targets of Markdown links stay, and so do addresses in code."""

    max_count: Count = 0

    def __call__(self, text: str) -> Edit | None:
        if "://" not in text and "www." not in text.lower():
            return None
        changed, count = substitute(URL, _space, text)
        return Edit("urls", count, self.max_count, changed) if count > self.max_count else None


def _space(match: re.Match) -> str:
    """What stays of an address: the space before it where a letter follows at once."""
    following = match.string[match.end() : match.end() + 1]
    return match[1] if following.isalnum() else ""
