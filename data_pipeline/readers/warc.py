"""WARC files, by fastwarc."""

import itertools
from collections.abc import Iterator
from typing import BinaryIO

from fastwarc.warc import ArchiveIterator, WarcRecordType

from data_pipeline.readers.base import Found, Items, Quarantined, too_large
from data_pipeline.readers.html import decode_page, page_text
from data_pipeline.sources import Warc

CHUNK = 1 << 20
MOST_RESTARTS = 1000  # in a file: one made of beginnings of records is no crawl
PAGES = ("text/html", "application/xhtml+xml")


def read_warc(file: BinaryIO, source: Warc) -> Items:
    """A document for each page fetched (`response`) and for each text of a WET file (`conversion`). `file` as it is on
    disk: fastwarc decompresses it record by record.

    What follows a record tells whether its length was true, so a document is handed on when the next is reached. Where
    none follows, reading goes on at the next place that looks like a record.
    """
    number, place, held = 0, 0, None
    for again in itertools.count():
        try:
            for count, at, item in _records(file, source, number):
                if held:
                    yield held
                number, place, held = count, at, item
        except OSError as error:
            if error.errno is not None:
                raise
            if "header" not in str(error):  # fastwarc tells bad headers from bad compression
                if held:
                    yield held
                raise
            if isinstance(held, Found):
                detail = f"no record follows it: its Content-Length is false, or the file is damaged here: {error}"
                held = Quarantined(held.place, "false_length", detail, len(held.text))
            if held:
                yield held
            if again == MOST_RESTARTS or (place := _next_record(file, place)) is None:
                raise
            held = None
            file.seek(place)
            continue
        if held:
            yield held
        return


def _records(file: BinaryIO, source: Warc, number: int) -> Iterator[tuple[int, int, Found | Quarantined | None]]:
    """(how many pages and texts there were, where in the file, what it gives) of each record from here on."""
    for record in ArchiveIterator(file, record_types=WarcRecordType.any_type, parse_http=False):
        if record.record_type not in (WarcRecordType.response, WarcRecordType.conversion):
            yield number, record.stream_pos, None
            continue
        number += 1
        try:
            item = _record(record, str(number), source)
        except OSError as error:  # this record's own encoding; the next may be whole
            if error.errno is not None:
                raise
            item = Quarantined(str(number), "unreadable", f"{type(error).__name__}: {error}")
        yield number, record.stream_pos, item


def _next_record(file: BinaryIO, after: int) -> int | None:
    """Where the next record begins that lies after the one at `after`: a line that begins as a header does, or in a
    compressed file a member."""
    file.seek(after)
    head = file.read(2)
    mark, skip = (b"\x1f\x8b\x08", 0) if head == b"\x1f\x8b" else (b"\nWARC/1.", 1)
    at, rest = after + 2, b""
    while chunk := file.read(CHUNK):
        found = (window := rest + chunk).find(mark)
        if found >= 0:
            return at - len(rest) + found + skip
        rest = window[-len(mark) + 1 :]
        at += len(chunk)
    return None


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
