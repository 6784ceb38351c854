"""WARC files: pages of a crawl (response, resource) and the plain text of WET files (conversion).

A damaged record does not affect others. If a record is not followed by another one, its Content-Length is wrong or the
file is damaged: the record is quarantined, and reading continues at the next line that begins a record.
"""

import re
from dataclasses import dataclass
from typing import BinaryIO

from data_pipeline.pages.encodings import decode_page
from data_pipeline.readers import http
from data_pipeline.readers.base import Found, Items, Quarantined, too_large, too_slow
from data_pipeline.readers.html import page_text
from data_pipeline.readers.limit import TooSlow, cpu_seconds
from data_pipeline.readers.members import DamagedMember, Members
from data_pipeline.sources import Warc

CHUNK = 1 << 20
LONGEST_HEAD = 1 << 16  # bytes of a record's headers
MOST_RESTARTS = 1000  # damaged records per file, before the file is given up
MOST_REREAD = 8  # x the bytes decompressed so far: time stays linear if every Content-Length covers the rest
BEGINNING = re.compile(rb"\nWARC/1\.")
ABOUT = ("warcinfo", "request", "metadata")  # records about other records, without documents


@dataclass(frozen=True)
class Record:
    """`headers`: {lower-case name: value}; `block`: content, cut at max_document_bytes + LONGEST_HEAD; `size`: bytes of
    content read, less than `length`, the Content-Length, if the file ends or is damaged; `damage`: the error."""

    headers: dict[str, str]
    block: bytearray
    size: int
    length: int
    damage: DamagedMember | None = None

    @property
    def kind(self) -> str:
        return self.headers.get("warc-type", "").lower()

    @property
    def url(self) -> str:
        return self.headers.get("warc-target-uri", "").strip("<>")


class NoRecord(ValueError):
    """The bytes at the expected beginning of a record are not a record."""


def read_warc(file: BinaryIO, source: Warc, size: int) -> Items:
    """A document for each page and text of a WARC file of `size` bytes, plain, in gzip members or in zstd frames; other
    records are quarantined with a reason, except undamaged ones of ABOUT."""
    members = Members(file, size, source)
    if members.start:
        yield Quarantined("byte 0", "unreadable", f"no record and no gzip member before byte {members.start}")
    number, restarts, reread = 0, 0, 0
    while restarts <= MOST_RESTARTS and reread <= MOST_REREAD * members.given:
        at = f"byte {members.start if members.packed else members.passed}"
        try:
            if (record := _next_record(members, source)) is None:
                return
        except NoRecord as error:
            yield Quarantined(at, "unreadable", str(error))
            restarts += 1
            if not _find_record(members, b""):
                return
            continue
        except DamagedMember as error:
            yield Quarantined(f"byte {error.start}", "unreadable", str(error))
            restarts += 1
            if not members.next_member():
                return
            continue
        number += record.kind not in ABOUT
        problem, damage = _end_problem(record, members)
        if not problem:
            if record.kind not in ABOUT:
                yield _item_in_time(record, str(number), source)
            if damage is None:
                continue
        else:  # also for a record about others: the damage may hide a document
            detail = f"{problem}{record.url and ': '}{record.url}"
            reason = "unreadable" if record.size < record.length else "false_length"
            yield Quarantined(at if record.kind in ABOUT else str(number), reason, detail, record.size)
        restarts += 1
        if damage:
            if damage.start != members.start or not problem:
                yield Quarantined(f"byte {damage.start}", "unreadable", str(damage))
            if not members.next_member():
                return
        elif not _find_record(members, record.block):
            return
        else:
            reread += len(record.block)
    yield Quarantined("", "unreadable", f"no record follows another at {restarts} places: the rest is left unread")


def _next_record(members: Members, source: Warc) -> Record | None:
    """The next record, None at the end of the file. Raises NoRecord, and DamagedMember if its headers cannot be
    decompressed."""
    while not (line := members.line(LONGEST_HEAD)).strip(b"\r\n"):
        if not line:
            return None
    if not line.startswith(b"WARC/"):
        raise NoRecord(f"no record of WARC begins with {line[:40]!r}")
    headers: dict[str, str] = {}
    left = LONGEST_HEAD
    while (line := members.line(left)).strip(b"\r\n"):
        if (left := left - len(line)) <= 0:
            raise NoRecord(f"its headers take more than {LONGEST_HEAD} bytes")
        name, colon, value = line.decode("utf-8", "replace").partition(":")
        if colon:
            headers.setdefault(name.strip().lower(), value.strip())
        elif line[:1] not in b" \t":
            raise NoRecord(f"{line[:40]!r} is no header")
    length = headers.get("content-length", "")
    if not (length.isascii() and length.isdigit() and len(length) < 19):
        raise NoRecord(f"Content-Length {length[:40]!r}")
    block, size, damage = bytearray(), 0, None
    bound = source.max_document_bytes + LONGEST_HEAD
    try:
        while size < int(length) and (piece := members.read(min(CHUNK, int(length) - size))):
            size += len(piece)
            block += piece[: bound - len(block)]
    except DamagedMember as error:
        damage = error
    return Record(headers, block, size, int(length), damage)


def _end_problem(record: Record, members: Members) -> tuple[str, DamagedMember | None]:
    """(Problem, damage). Problem: why the record is incomplete, "" if a record, another gzip member that is damaged, or
    the end of the file follows. Damage: the error found in this record or at the beginning of the next one."""
    if record.damage:
        return f"{record.size} of {record.length} bytes are there: {record.damage}", record.damage
    if record.size < record.length:
        return f"{record.size} of {record.length} bytes are there", None
    start = members.start
    try:
        while not (line := members.line(LONGEST_HEAD)).strip(b"\r\n") and line:
            pass
    except DamagedMember as error:
        return (str(error) if error.start == start else ""), error
    members.push(line)
    if not line or line.startswith(b"WARC/"):
        return "", None
    return f"Content-Length {record.length} is false, or the file is damaged here: no record follows", None


def _find_record(members: Members, block: bytearray | bytes) -> bool:
    """Seeks the next line that begins a record, in `block`, the last bytes read, or after it. Returns whether there is
    one."""
    if found := BEGINNING.search(block):
        members.push(bytes(memoryview(block)[found.start() + 1 :]))
        return True
    rest = block[-8:]
    try:
        while piece := members.read(CHUNK):
            if found := BEGINNING.search(window := rest + piece):
                members.push(window[found.start() + 1 :])
                return True
            rest = window[-8:]
    except DamagedMember:
        return members.next_member()
    return False


def _item_in_time(record: Record, place: str, source: Warc) -> Found | Quarantined:
    try:
        with cpu_seconds(source.max_seconds):
            return _item(record, place, source)
    except TooSlow:
        return too_slow(place, f"{record.size} bytes of {record.url}", source, record.size)


def _item(record: Record, place: str, source: Warc) -> Found | Quarantined:
    """The document of a complete content record, or a Quarantined."""
    if record.kind == "conversion":
        return _document(record.block, "text/plain", None, record, place, source)
    if record.kind == "resource":
        kind = record.headers.get("content-type", "")
        return _document(record.block, http.media_type(kind), http.charset(kind), record, place, source)
    if record.kind != "response":
        return Quarantined(place, "record_type", f"{record.kind or 'no WARC-Type'} {record.url}", record.size)
    cut = record.size > len(record.block)
    response = http.parse_response(record.block)  # removes the headers from the block
    if response is None:
        return Quarantined(place, "not_http", f"{record.headers.get('content-type', '')} {record.url}", record.size)
    if response.status not in source.statuses:
        return Quarantined(place, "status", f"{response.status} {record.url}", record.size)
    if cut:
        return too_large(place, record.size, source)
    try:
        data = response.content(source.max_document_bytes)
    except http.Undecodable as error:
        return Quarantined(place, "undecodable", f"{error}: {record.url}", record.size)
    except http.TooLarge:
        return too_large(place, source.max_document_bytes, source)
    return _document(data, response.media_type, response.charset, record, place, source)


def _document(
    data: bytes | bytearray, media_type: str, charset: str | None, record: Record, place: str, source: Warc
) -> Found | Quarantined:
    if len(data) > source.max_document_bytes:
        return too_large(place, record.size, source)
    media_type = media_type or http.sniff(data)
    extra = {"key": record.url} if record.url else {}
    if media_type in http.PAGES:
        return page_text(data, charset, place, source, extra)
    if media_type != "text/plain":
        return Quarantined(place, "media_type", f"{media_type or 'none'} {record.url}", record.size)
    text = decode_page(data, charset, markup=False)
    if not text.strip():
        return Quarantined(place, "empty", record.url or "no text", len(data))
    if not text.strip("\ufffd \t\r\n"):
        return Quarantined(place, "undecodable", f"charset {charset}: {record.url}", len(data))
    return Found(place, text, extra)
