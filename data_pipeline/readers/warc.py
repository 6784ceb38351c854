"""WARC files, by fastwarc."""

from typing import BinaryIO

from fastwarc.warc import ArchiveIterator, WarcRecordType

from data_pipeline.readers.base import Found, Items, Quarantined, too_large
from data_pipeline.readers.html import decode_page, page_text
from data_pipeline.sources import Warc

PAGES = ("text/html", "application/xhtml+xml")


def read_warc(file: BinaryIO, source: Warc) -> Items:
    """A document for each page fetched (`response`) and for each text of a WET file (`conversion`). `file` as it is on
    disk: fastwarc decompresses it record by record."""
    held = None
    try:
        # What follows a record tells whether its length was true: a document is handed on when the next is reached.
        for item in _records(file, source):
            if held:
                yield held
            held = item
    except OSError as error:
        if error.errno is not None or not held:
            raise
        if isinstance(held, Found) and "header" in str(error):  # fastwarc tells bad headers from bad compression
            detail = f"no record follows it: its Content-Length is false, or the file is damaged here: {error}"
            held = Quarantined(held.place, "false_length", detail, len(held.text))
        yield held
        raise
    if held:
        yield held


def _records(file: BinaryIO, source: Warc) -> Items:
    kinds = WarcRecordType.response | WarcRecordType.conversion
    for number, record in enumerate(ArchiveIterator(file, record_types=kinds, parse_http=False), 1):
        try:
            item = _record(record, str(number), source)
        except OSError as error:  # this record's own encoding; the next may be whole
            if error.errno is not None:
                raise
            item = Quarantined(str(number), "unreadable", f"{type(error).__name__}: {error}")
        if item:
            yield item


def _record(record, place: str, source: Warc) -> Found | Quarantined | None:
    plain = record.record_type == WarcRecordType.conversion
    if not plain:
        record.parse_http(auto_decode="all")
        if record.http_content_type not in (*PAGES, "text/plain"):
            return None
    data = record.reader.read(source.max_document_bytes + 1)
    if len(data) > source.max_document_bytes:
        return too_large(place, max(record.content_length, len(data)), source)
    coded = not plain and {"content-encoding", "transfer-encoding"} & {name.lower() for name, _ in record.http_headers}
    if not coded and len(data) < record.content_length:
        detail = f"{len(data)} of {record.content_length} bytes are there"
        return Quarantined(place, "unreadable", detail, len(data))
    url = record.headers.get("WARC-Target-URI", "")
    extra = {"key": url} if url else {}
    if plain or record.http_content_type == "text/plain":
        text = decode_page(data, None if plain else record.http_charset)
        return Found(place, text, extra) if text.strip() else Quarantined(place, "empty", url or "no text")
    return page_text(decode_page(data, record.http_charset), place, extra)
