"""Pages as documents: the text that a reader of the page sees, by resiliparse in a process of its own."""

from data_pipeline.pages.client import Extractor, Refused
from data_pipeline.readers.base import Found, Quarantined
from data_pipeline.sources import Source

SUFFIXES = (".html", ".htm", ".xhtml")
EXTRACTOR = Extractor()  # of this process; ends with it


def page_text(
    data: bytes, label: str | None, place: str, source: Source, extra: dict | None = None
) -> Found | Quarantined:
    """The main content of a page of bytes `data`, whose encoding was sent as `label`."""
    try:
        limits = {"most_bytes": source.max_document_bytes, "seconds": source.max_seconds}
        return Found(place, EXTRACTOR.text(data, label, **limits), extra or {})
    except Refused as refused:
        return Quarantined(place, refused.reason, refused.detail, len(data))
