"""JSON lines."""

import codecs
import json
from typing import BinaryIO

import orjson

from data_pipeline.readers.base import Found, Items, Quarantined, too_large
from data_pipeline.readers.html import page_text
from data_pipeline.sources import Jsonl, Parquet

CHUNK = 1 << 20


def read_jsonl(file: BinaryIO, source: Jsonl) -> Items:
    """A document a line. Lines are read to a bound, so that one of a gigabyte costs no gigabyte."""
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
            yield _line(line, str(number), source)


def _line(line: bytes, place: str, source: Jsonl) -> Found | Quarantined:
    try:
        record = orjson.loads(line)
    except ValueError as error:
        return Quarantined(place, "not_json", str(error), len(line))
    if not isinstance(record, dict):
        return Quarantined(place, "not_json", f"a {type(record).__name__} and no object", len(line))
    # JSON readers silently take the last of two values. Only lines that spell a key twice pay for looking.
    if any(line.count(f'"{key}"'.encode()) > 1 for key in (source.text_key, source.id_key)):
        try:
            twice = _repeated(line)
        except RecursionError:
            return Quarantined(place, "not_json", "nested too deep to look for keys that are there twice", len(line))
        if twice:
            return Quarantined(place, "duplicate_key", f"key {twice!r} is there twice", len(line))
    return from_record(record, place, source)


def from_record(record: dict, place: str, source: Jsonl | Parquet) -> Found | Quarantined:
    """A document from a record of named values."""
    text = record.get(source.text_key)
    if not isinstance(text, str):
        return Quarantined(place, "no_text", f"{source.text_key} is {type(text).__name__}")
    if not text or text.isspace():
        return Quarantined(place, "empty", f"{source.text_key} is empty")
    if (size := len(text.encode())) > source.max_document_bytes:
        return too_large(place, size, source)
    key = record.get(source.id_key)
    extra = {"key": str(key)} if isinstance(key, str | int) else {}
    return page_text(text.encode(), "utf-8", place, source, extra) if source.html else Found(place, text, extra)


def _repeated(line: bytes) -> str | None:
    """The first key that an object of a JSON line has twice."""
    found: list[str] = []

    def look(pairs: list[tuple[str, object]]) -> None:
        keys = [key for key, _ in pairs]
        found.extend(key for key in keys if keys.count(key) > 1)

    json.loads(line, object_pairs_hook=look)
    return found[0] if found else None
