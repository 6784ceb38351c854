"""The text that a reader of a web page sees, by resiliparse."""

import re

from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.encoding import bytes_to_str, detect_encoding

from data_pipeline.readers.base import Found, Quarantined

# The extractor takes the square of the depth in time; browsers themselves flatten what is deeper than 512.
DEEPEST = 2000
NESTING = re.compile(r"<(/?)(?:div|article|section|main)\b", re.IGNORECASE)
SUFFIXES = (".html", ".htm", ".xhtml")


def page_text(html: str, place: str, extra: dict | None = None) -> Found | Quarantined:
    """The main content of a page: navigation, scripts, forms and footers go; preformatted text, lists and line breaks
    stay."""
    if (depth := _depth(html)) > DEEPEST:
        return Quarantined(place, "too_deep", f"{depth} elements inside one another, at most {DEEPEST}", len(html))
    text = extract_plain_text(html, main_content=True, preserve_formatting=True, list_bullets=True, alt_texts=False)
    if not text.strip():
        return Quarantined(place, "empty", "a page without content", len(html))
    return Found(place, text.strip() + "\n", extra or {})


def decode_page(data: bytes, charset: str | None = None) -> str:
    """A page's characters: in the encoding that it was sent with, or else the one that its bytes suggest."""
    try:
        return bytes_to_str(data, charset or detect_encoding(data), fallback_encodings=("utf-8", "windows-1252"))
    except LookupError:  # a server may name an encoding that does not exist
        return bytes_to_str(data, detect_encoding(data), fallback_encodings=("utf-8", "windows-1252"))


def _depth(html: str) -> int:
    """How many elements lie inside one another at most, of those whose depth costs its square in time."""
    if html.count("<") <= DEEPEST:
        return 0
    depth = deepest = 0
    for match in NESTING.finditer(html):
        depth = max(depth - 1, 0) if match[1] else depth + 1
        deepest = max(deepest, depth)
    return deepest
