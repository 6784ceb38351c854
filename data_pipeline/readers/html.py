"""The text that a reader of a web page sees, by resiliparse."""

from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.encoding import bytes_to_str, detect_encoding

from data_pipeline.readers.base import Found, Quarantined

SUFFIXES = (".html", ".htm", ".xhtml")


def page_text(html: str, place: str, extra: dict | None = None) -> Found | Quarantined:
    """The main content of a page: navigation, scripts, forms and footers go; preformatted text, lists and line breaks
    stay."""
    text = extract_plain_text(html, main_content=True, preserve_formatting=True, list_bullets=True, alt_texts=False)
    if not text.strip():
        return Quarantined(place, "empty", "a page without content", len(html))
    return Found(place, text.strip() + "\n", extra or {})


def decode_page(data: bytes, charset: str | None = None) -> str:
    """A page's characters: in the encoding that it was sent with, or else the one that its bytes suggest."""
    return bytes_to_str(data, charset or detect_encoding(data), fallback_encodings=("utf-8", "windows-1252"))
