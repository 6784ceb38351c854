"""Binary data, or text decoded with the wrong encoding."""

import re
from typing import ClassVar

from pydantic.dataclasses import dataclass

from data_pipeline.filters.base import Drop, rule
from data_pipeline.letters import WINDOWS_1252
from data_pipeline.thresholds import STRICT, Share

# The replacement character, control characters other than white space and what the edit `characters` restores, private
# use, and UTF-8 read as Latin-1 or Windows-1252: an accented capital followed by what a continuation byte becomes.
GARBLED = re.compile(
    f"(?!{WINDOWS_1252})[\ufffd\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ue000-\uf8ff]"
    "|[\u00c2-\u00c3][\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u203a\u20ac\u2122]"
    "|\u00e2[\u0080\u20ac][\u0080-\u00bf\u0153\u2013-\u203a\u2122\u02dc\u0161]"
)

NOT_GARBLED_ASCII = bytes(code for code in range(128) if not GARBLED.match(chr(code)))


@rule("garbled", place=0, on=True)
@dataclass(frozen=True, config=STRICT)
class Garbled:
    """`max_share`: maximum of garbled places (undecodable byte, control character, mojibake pair) per character."""

    before_edits: ClassVar[bool] = True
    max_share: Share = 0.001

    def __call__(self, text: str) -> Drop | None:
        share = _count(text) / max(len(text), 1)
        return Drop("max_share", share, self.max_share) if share > self.max_share else None


def _count(text: str) -> int:
    """Number of garbled places in a text."""
    if text.isascii():
        return len(text.encode().translate(None, NOT_GARBLED_ASCII))
    return sum(1 for _ in GARBLED.finditer(text))
