"""JSON lines."""

import codecs
import contextlib
import json
import re
from typing import BinaryIO

import orjson

from data_pipeline.readers.base import Found, Items, Quarantined, too_large, too_slow
from data_pipeline.readers.html import page_text
from data_pipeline.readers.limit import TooSlow, cpu_seconds
from data_pipeline.sources import Jsonl, Parquet

CHUNK = 1 << 20
STRUCTURE = (b",", b":", b"[", b"{")
STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
BYTES_A_VALUE = 128  # a line may have one JSON value per 128 bytes of max_document_bytes
FEWEST_VALUES = 50_000  # always allowed
SHOWN_KEYS = 20  # keys in a message
LINES_LOOKED_AT = 10  # first lines of a file from which keys are collected
LONGEST_KEY = 10_000  # characters of a document's name: shards hold 1 MiB of metadata a document


def read_jsonl(file: BinaryIO, source: Jsonl) -> Items:
    """A document per line. Lines are read up to a limit, so that a line of a gigabyte does not take a gigabyte."""
    number, bound = 0, source.max_document_bytes
    while line := file.readline(bound + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) > bound:
            size = len(line)
            while not line.endswith(b"\n") and (line := file.readline(CHUNK)):
                size += len(line)
            yield too_large(str(number), size, source)
        elif line.strip():
            try:
                with cpu_seconds(source.max_seconds):
                    item = _line(line, str(number), source)
            except TooSlow:
                item = too_slow(str(number), f"{len(line)} bytes of JSON", source, len(line))
            line = b""  # frees the line before the document is processed
            yield item


def _line(line: bytes, place: str, source: Jsonl) -> Found | Quarantined:
    most = max(FEWEST_VALUES, source.max_document_bytes // BYTES_A_VALUE)
    if _holds_more_values(line, most):
        return Quarantined(place, "too_many_values", f"more than {most} values, keys and brackets", len(line))
    try:
        record = orjson.loads(line)
    except ValueError as error:
        return Quarantined(place, "not_json", str(error), len(line))
    if not isinstance(record, dict):
        return Quarantined(place, "not_json", f"a {type(record).__name__} and no object", len(line))
    # JSON parsers silently keep the last of duplicate keys. Only lines with two such strings are checked.
    if any(line.count(f'"{key}"'.encode()) > 1 for key in (source.text_key, source.id_key)):
        try:
            twice = _repeated(line)
        except RecursionError:
            return Quarantined(place, "not_json", "nested too deep for the check of duplicate keys", len(line))
        if twice:
            return Quarantined(place, "duplicate_key", f"key {twice!r} is there twice", len(line))
    return from_record(record, place, source)


def from_record(record: dict, place: str, source: Jsonl | Parquet) -> Found | Quarantined:
    """A document from a JSON object or Parquet row. Its name is not kept if it is no string or integer, or longer than
    LONGEST_KEY."""
    text = record.get(source.text_key)
    if not isinstance(text, str):
        seen = "" if source.text_key in record else f"; keys: {', '.join(list(record)[:SHOWN_KEYS])}"
        return Quarantined(place, "no_text", f"{source.text_key} is {type(text).__name__}{seen}")
    if not text or text.isspace():
        return Quarantined(place, "empty", f"{source.text_key} is empty")
    if (size := _bytes(text, source.max_document_bytes)) > source.max_document_bytes:
        return too_large(place, size, source)
    key = record.get(source.id_key)
    extra = {"key": str(key)} if isinstance(key, str | int) and len(str(key)) <= LONGEST_KEY else {}
    return page_text(text.encode(), "utf-8", place, source, extra) if source.html else Found(place, text, extra)


def jsonl_keys(file: BinaryIO, source: Jsonl) -> list[str]:
    """The keys of the objects in a file's first lines."""
    keys: dict[str, None] = {}
    for _ in range(LINES_LOOKED_AT):
        line = file.readline(source.max_document_bytes + 1).removeprefix(codecs.BOM_UTF8)
        if not _holds_more_values(line, FEWEST_VALUES):
            with contextlib.suppress(ValueError):
                record = orjson.loads(line)
                keys |= dict.fromkeys(record if isinstance(record, dict) else [])
    return list(keys)


def _bytes(text: str, most: int) -> int:
    """Number of UTF-8 bytes of a text, or of its characters if the bytes cannot exceed `most`; counted in pieces,
    without an encoded copy of the whole text."""
    if text.isascii() or 4 * len(text) <= most:
        return len(text)
    return sum(len(text[at : at + CHUNK].encode()) for at in range(0, len(text), CHUNK))


def _holds_more_values(line: bytes, most: int) -> bool:
    """Whether a JSON line has more than `most` commas, colons, brackets and strings, outside strings: each value takes
    up to 90 bytes of memory, even a short one."""
    if sum(line.count(mark) for mark in STRUCTURE) <= most:
        return False
    values = end = 0
    for string in STRING.finditer(line):
        values += 1 + sum(line.count(mark, end, string.start()) for mark in STRUCTURE)
        end = string.end()
        if values > most:
            return True
    return values + sum(line.count(mark, end) for mark in STRUCTURE) > most


def _repeated(line: bytes) -> str | None:
    """The first key that occurs twice in an object of a JSON line, or None."""
    found: list[str] = []

    def look(pairs: list[tuple[str, object]]) -> None:
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                found.append(key)
            seen.add(key)

    json.loads(line, object_pairs_hook=look)
    return found[0] if found else None
