"""Web pages as documents: their visible text, extracted by resiliparse in a separate process."""

from data_pipeline.pages.client import EXTRACTOR, Refused
from data_pipeline.readers.base import Found, Quarantined
from data_pipeline.sources import Source

SUFFIXES = (".html", ".htm", ".xhtml")


def page_text(
    data: bytes, label: str | None, place: str, source: Source, extra: dict | None = None
) -> Found | Quarantined:
    """The main content of the page `data`; `label`: charset of the HTTP header."""
    if not data.strip():
        return Quarantined(place, "empty", "a page without a character", len(data))
    try:
        limits = {"most_bytes": source.max_document_bytes, "seconds": source.max_seconds}
        return Found(place, EXTRACTOR.text(data, label, **limits), extra or {})
    except Refused as refused:
        return Quarantined(place, refused.reason, refused.detail, len(data))
