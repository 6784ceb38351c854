"""Letters, marks and words in any script, for rules, edits and deduplication.

A combining mark (vowel sign, tone mark, point) belongs to the letter before it. Python's `\\w` and `str.isalpha` do not
match marks, so Hindi or pointed Hebrew would count as symbols. `plain` removes the marks.
"""

import functools
import re
import unicodedata
from collections.abc import Iterable, Iterator

# Blocks where Unicode adds scripts: code points that Python's tables do not know yet count as letters.
GROWING = (range(0x10000, 0x1D000), range(0x1DF00, 0x1EE00))
# Symbols in Unicode that are letters to their readers: Braille, SignWriting.
WRITTEN = (range(0x2801, 0x2900), range(0x1D800, 0x1DA87))
# Word separators other than the space: Tibetan tsheg, Ethiopic word space, zero-width space, blank Braille cell, and
# dividers of ancient scripts.
SEPARATORS = (
    "\u0f0b\u0f0c\u1361\u200b\u2800\u16eb\u16ec\u16ed\u2e31"
    "\U00010100\U00010101\U0001039f\U000103d0\U00010857\U0001091f\U0001093f\U00012470"
)
# Scripts without spaces between words: each of their letters counts as a word.
SPACELESS = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"  # Myanmar
    "\u1700-\u171f\u1780-\u17ff"  # Tagalog, Khmer
    "\u1950-\u19df\u1a00-\u1aaf\uaa80-\uaadf\U00011700-\U0001174f"  # Tai scripts, Buginese, Ahom
    "\u1b00-\u1bff\ua930-\ua95f\ua980-\ua9df\uaa00-\uaa5f"  # Balinese, Sundanese, Batak, Rejang, Javanese, Cham
    "\u3005-\u3007\u3040-\u312f\u31a0-\u31bf\u31f0-\u31ff\uff66-\uff9f\U0001aff0-\U0001b16f"  # kana, Bopomofo
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese characters
    "\ua000-\ua4cf\ua840-\ua87f\U00016fe0-\U00018d8f\U0001b170-\U0001b2ff"  # Yi, Phags-pa, Tangut, Khitan, Nüshu
    "\U00011ee0-\U00011f5f\U00012000-\U0001254f\U00013000-\U0001467f"  # Makasar, Kawi, cuneiform, hieroglyphs
)
HANGUL = "\u1100-\u11ff\u3130-\u318f\ua960-\ua97f\uac00-\ud7ff"  # spaced words, but particles follow without a space


def ranges(codes: Iterable[int]) -> str:
    """Ascending code points as the inside of a regular expression's character class."""
    found: list[list[int]] = []
    for code in codes:
        if found and code == found[-1][1] + 1:
            found[-1][1] = code
        else:
            found.append([code, code])
    return "".join(f"{re.escape(chr(first))}-{re.escape(chr(last))}" for first, last in found)


def _marks() -> Iterator[int]:
    """Combining marks, joiners, direction marks and variation selectors."""
    kinds = frozenset(("Mn", "Mc", "Me", "Cf"))
    for code in (*range(0x80, 0x20000), *range(0xE0100, 0xE01F0)):
        if unicodedata.category(chr(code)) in kinds and chr(code) not in SEPARATORS:
            yield code


def _other_letters() -> Iterator[int]:
    """Letters for which `str.isalnum` is False."""
    for code in sorted(code for block in (*GROWING, *WRITTEN) for code in block):
        if unicodedata.category(chr(code)) in ("Cn", "So"):
            yield code
    yield from range(0x2A6DE, 0x40000)  # ideographs, including future ones


MARKS = ranges(_marks())
_OTHER_LETTERS = ranges(_other_letters())
_NOT_PLAIN = re.compile(f"([{MARKS}]+)|([{SEPARATORS}])|[{_OTHER_LETTERS}]")
# A superset of _NOT_PLAIN without the characters of English, French or Russian text.
_MAYBE_NOT_PLAIN = re.compile(
    "[\xad\u0300-\u036f\u0483-\u1fff\u200b-\u200f\u202a-\u202e\u2060-\u206f\u20d0-\u20ff\u2800-\u28ff\u2ce0-\u2dff"
    "\u2e31\u302a-\u302f\u3099\u309a\ua66f-\uabff\ufb1e\ufe00-\ufe2f\ufeff\ufff9-\ufffb\U00010000-\U0010ffff]"
)
# Quotes, dashes and letters of Windows-1252 read as Latin-1. After ASCII alone: UTF-8 read as Latin-1 has such a
# character only after another one that is not ASCII. Without U+0085, a line end.
WINDOWS_1252 = "(?<![^\\t\\n -~])[\x80\x82-\x84\x86-\x8c\x8e\x91-\x9c\x9e\x9f]"
_SPACELESS = re.compile(f"[{SPACELESS}]")
_SIMPLE_WORDS = re.compile(r"\w+")
_MAYBE_SPECIAL = re.compile(
    _MAYBE_NOT_PLAIN.pattern[:-1] + "\u3005-\u31ff\u3400-\u9fff\ua000-\ua4cf\uf900-\ufaff\uff66-\uff9f]"
)
# Words of letters and digits with their marks; of scripts without spaces, each letter with its marks.
WORDS = re.compile(rf"(?:(?![{SPACELESS}])[\w{MARKS}])+|[{SPACELESS}][{MARKS}]*")


def _replacement(match: re.Match) -> str:
    if match[1]:
        return ""
    if match[2]:
        return " "
    return "\ua000" if _SPACELESS.match(match[0]) else "\ua500"  # letters of Yi and of Vai, which have no case


def plain(text: str) -> str:
    """`text` with one character per letter: without marks, word separators as spaces, and substitutes for letters that
    Python takes for symbols. For counting only; comparisons of texts keep the marks."""
    return text if text.isascii() else _plain(text)


@functools.lru_cache(maxsize=1)  # all rules are applied to one document before the next
def _plain(text: str) -> str:
    return _NOT_PLAIN.sub(_replacement, text) if _MAYBE_NOT_PLAIN.search(text) else text


def find_words(text: str) -> list[str]:
    """Letters and digits with their marks; in scripts without spaces between words, each letter with its marks."""
    simple = text.isascii() or not _MAYBE_SPECIAL.search(text)
    return _SIMPLE_WORDS.findall(text) if simple else WORDS.findall(text)


def composed(text: str) -> str:
    """`text` in NFC, for comparisons."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def count_words(text: str) -> int:
    """Number of words: pieces between spaces, and every letter of a script without spaces."""
    text = plain(text)
    if text.isascii():
        return len(text.split())
    return len(_SPACELESS.sub(" x ", text).split())


def spaceless(text: str) -> int:
    """Number of letters that belong to scripts without spaces between words."""
    return 0 if text.isascii() else len(_SPACELESS.findall(plain(text)))
