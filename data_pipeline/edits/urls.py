"""Addresses on the web: no model learns them, and all are alike."""

import re

from pydantic.dataclasses import dataclass

from data_pipeline.edits.base import Edit, edit
from data_pipeline.letters import HANGUL, MARKS, SPACELESS
from data_pipeline.protected import outside_protected
from data_pipeline.thresholds import STRICT, Count

# Of other letters than those of ASCII, an address has those of scripts with spaces: in the others the text goes on
# behind it without one, and so does a Korean particle.
LETTER = rf"(?![{SPACELESS}{HANGUL}])(?:[^\W\0-\x7f]|[{MARKS}])"
CHARACTER = rf"(?:[A-Za-z0-9\-._~:/?#@!$&*+,;=%|^\\{{]|{LETTER})"
LAST = rf"(?:[A-Za-z0-9\-_~/#@$&*+=%|^\\{{]|{LETTER})"  # what follows it is punctuation of the text
REST = rf"(?:{CHARACTER}|\({CHARACTER}*\))*(?:{LAST}|\({CHARACTER}*\))"
# Its first letter is looked for first: looking for each scheme at each place takes three times as long.
ADDRESS = re.compile(r"[hHfFwW](?:(?<=[hH])[tT][tT][pP][sS]?://|(?<=[fF])[tT][pP]://|(?<=[wW])[wW][wW]\.)" + REST)
BRACKETS = {"(": ")", "[": "]", "<": ">", "\uff08": "\uff09", "\u3010": "\u3011"}


@edit("urls")
@dataclass(frozen=True, config=STRICT)
class Urls:
    """Removes web addresses when there are more than `max_count`, with brackets that hold nothing else and the space
    before, unless a letter follows. The targets of Markdown links stay, and so do addresses in code."""

    max_count: Count = 0

    def __call__(self, text: str) -> Edit | None:
        if "://" not in text and "www." not in text.lower():
            return None
        count = 0

        def change(piece: str) -> str:
            nonlocal count
            piece, made = _without_addresses(piece)
            count += made
            return piece

        changed = outside_protected(text, change) if ADDRESS.search(text) else text
        return Edit("urls", count, self.max_count, changed) if count > self.max_count else None


def _without_addresses(piece: str) -> tuple[str, int]:
    """A piece without addresses, and how many there were."""
    kept, at = [], 0
    for address in ADDRESS.finditer(piece):
        start, end = address.span()
        before = piece[start - 1 : start]
        if before and BRACKETS.get(before) == piece[end : end + 1]:
            start, end = start - 1, end + 1
        elif before.isascii() and before.isalnum():
            continue  # the end of a word
        if start > at and piece[start - 1] == " " and not piece[end : end + 1].isalnum():
            start -= 1
        kept.append(piece[at:start])
        at = end
    return "".join([*kept, piece[at:]]), len(kept)
