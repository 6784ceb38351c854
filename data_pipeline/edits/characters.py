"""Special characters: a standard form for each; invisible ones are removed."""

import re
import unicodedata

from pydantic.dataclasses import dataclass

from data_pipeline.edits.base import Edit, counted, edit
from data_pipeline.letters import WINDOWS_1252
from data_pipeline.thresholds import STRICT, Count

# Removed: zero-width space, word joiner, soft hyphen, byte order mark, direction marks and controls, tags; controls
# other than tab and line feed; the replacement character; private use. Kept: zero-width joiners, which emoji, Indic
# scripts and Persian need, and the tags of flag emoji.
REMOVED = re.compile(
    "[\u200b\u2060\u00ad\ufeff\u200e\u200f\u202a-\u202e\u2066-\u2069\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f\ufffd"
    "\ue000-\uf8ff\U000e0000-\U000e007f]"
)
WINDOWS = re.compile(WINDOWS_1252)
FLAG = re.compile("(\U0001f3f4[\U000e0020-\U000e007e]+\U000e007f)")
LINES = re.compile("\r\n?|[\x0c\x85\u2028\u2029]")
SPACES = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f]")
STANDARD_ASCII = bytes((9, 10, *range(32, 127)))


@edit("characters")
@dataclass(frozen=True, config=STRICT)
class Characters:
    """Removes invisible and undecodable characters, restores quotes and dashes of Windows-1252 read as Latin-1,
    converts line ends to line feeds and all spaces but the ideographic one to U+0020, and composes accents (NFC), if
    more than `max_count` characters would change."""

    max_count: Count = 0

    def __call__(self, text: str) -> Edit | None:
        if text.isascii() and not text.encode().translate(None, STANDARD_ASCII):
            return None
        changed, count = counted(text, standard_characters) if standard_characters(text)[1] else (text, 0)
        return Edit("special_characters", count, self.max_count, changed) if count > self.max_count else None


def standard_characters(text: str) -> tuple[str, int]:
    """(`text` with standard characters, number of characters that changed)."""
    text, restored = WINDOWS.subn(lambda match: match[0].encode("latin-1").decode("cp1252"), text)
    changed, removed = REMOVED.subn("", text)
    if "\U000e007f" in text:
        pieces = FLAG.split(text)  # every second piece is a flag emoji
        changed = "".join(piece if number % 2 else REMOVED.sub("", piece) for number, piece in enumerate(pieces))
        removed = len(text) - len(changed)
    changed, lines = LINES.subn("\n", changed)
    changed, spaces = SPACES.subn(" ", changed)
    count = restored + removed + lines + spaces
    if not unicodedata.is_normalized("NFC", changed):
        composed = unicodedata.normalize("NFC", changed)
        count += max(1, len(changed) - len(composed))
        changed = composed
    return changed, count
