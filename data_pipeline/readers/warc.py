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
    kinds = WarcRecordType.response | WarcRecordType.conversion
    records = ArchiveIterator(file, record_types=kinds, parse_http=True, auto_decode="all")
    for number, record in enumerate(records, 1):
        place = str(number)
        plain = record.record_type == WarcRecordType.conversion
        if not plain and record.http_content_type not in (*PAGES, "text/plain"):
            continue
        data = record.reader.read(source.max_document_bytes + 1)
        if len(data) > source.max_document_bytes:
            yield too_large(place, record.content_length, source)
            continue
        coded = not plain and {"content-encoding", "transfer-encoding"} & {
            name.lower() for name, _ in record.http_headers
        }
        if not coded and len(data) < record.content_length:
            yield Quarantined(place, "unreadable", f"{len(data)} of {record.content_length} bytes are there", len(data))
            continue
        url = record.headers.get("WARC-Target-URI", "")
        extra = {"key": url} if url else {}
        if plain or record.http_content_type == "text/plain":
            text = decode_page(data, None if plain else record.http_charset)
            yield Found(place, text, extra) if text.strip() else Quarantined(place, "empty", url or "no text")
        else:
            yield page_text(decode_page(data, record.http_charset), place, extra)
