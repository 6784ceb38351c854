"""Removes web addresses, from which a model learns nothing."""

import re

from pydantic.dataclasses import dataclass

from data_pipeline.edits.base import Edit, counted, edit
from data_pipeline.letters import HANGUL, MARKS, SPACELESS
from data_pipeline.thresholds import STRICT, Count

# Non-ASCII letters of an address: only of scripts with spaces between words; in other scripts, and before a Korean
# particle, text follows an address without a space.
LETTER = rf"(?![{SPACELESS}{HANGUL}])(?:[^\W\0-\x7f]|[{MARKS}])"
CHARACTER = rf"(?:[A-Za-z0-9\-._~:/?#@!$&*+,;=%|^\\{{]|{LETTER})"
LAST = rf"(?:[A-Za-z0-9\-_~/#@$&*+=%|^\\{{]|{LETTER})"  # last character; punctuation after it is text
REST = rf"(?:{CHARACTER}|\({CHARACTER}*\))*(?:{LAST}|\({CHARACTER}*\))"
# Starts with the schemes' first letters: alternatives of whole schemes are three times slower.
ADDRESS = re.compile(r"[hHfFwW](?:(?<=[hH])[tT][tT][pP][sS]?://|(?<=[fF])[tT][pP]://|(?<=[wW])[wW][wW]\.)" + REST)
BRACKETS = {"(": ")", "[": "]", "<": ">", "\uff08": "\uff09", "\u3010": "\u3011"}


@edit("urls")
@dataclass(frozen=True, config=STRICT)
class Urls:
    """Removes web addresses if there are more than `max_count`, with brackets around them and the space before, unless
    a letter follows. Targets of Markdown links and addresses in code stay."""

    max_count: Count = 0

    def __call__(self, text: str) -> Edit | None:
        if "://" not in text and "www." not in text.lower():
            return None
        changed, count = counted(text, _without_addresses) if ADDRESS.search(text) else (text, 0)
        return Edit("urls", count, self.max_count, changed) if count > self.max_count else None


def _without_addresses(piece: str) -> tuple[str, int]:
    """(The piece without addresses, number of addresses)."""
    kept, at = [], 0
    for address in ADDRESS.finditer(piece):
        start, end = address.span()
        before = piece[start - 1 : start]
        if before and BRACKETS.get(before) == piece[end : end + 1]:
            start, end = start - 1, end + 1
        elif before.isascii() and before.isalnum():
            continue  # the match begins inside a word
        if start > at and piece[start - 1] == " " and not piece[end : end + 1].isalnum():
            start -= 1
        kept.append(piece[at:start])
        at = end
    return "".join([*kept, piece[at:]]), len(kept)
