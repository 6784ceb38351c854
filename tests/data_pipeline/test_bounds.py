"""The bounds of docs/bounds.md: memory by max_document_bytes, time by the size, structure before the costly step."""

import gzip
import json
import os
import time
from pathlib import Path

import pytest

from data_pipeline.pages import client
from data_pipeline.pages.structure import FEWEST_TAGS, MOST_ATTRIBUTES, structure_problem
from data_pipeline.pages.worker import extract
from data_pipeline.readers.lines import FEWEST_VALUES, read_jsonl
from tests.data_pipeline.test_readers import read, source, warc_record
from tests.helpers.peaks import costs_of_reading

WORDS = "Some words of text. "
MULTIPLE = 6  # of max_document_bytes: the stated bound of memory
ROOM = 64 << 20  # beside it: see data_pipeline.pages.worker


def page(body: str) -> str:
    return f"<!doctype html><html><body><main>{body}</main></body></html>"


def line_of_values(size: int) -> bytes:
    return b'{"text": "words", "x": [' + b"[]," * (size // 3) + b"1]}"


def fill(size: int, unit: str) -> str:
    return unit * (size // len(unit.encode()))


LARGE = {  # name -> (file, its bytes for documents of at most so many, whether a document comes of it)
    "JSON of small values": ("a.jsonl", lambda most: line_of_values(most - 50), False),
    "JSON of one wide text": (
        "a.jsonl",
        lambda most: f'{{"text": "\U0001f600{fill(most - 50, WORDS)}"}}'.encode(),
        True,
    ),
    "a page of small elements": ("a.html", lambda most: page(fill(most - 100, "x<br>")).encode(), False),
    "a page of text": ("a.html", lambda most: page(fill(most // 2, f"<p>{WORDS * 20}</p>")).encode(), True),
    "a WARC page of small elements": (
        "a.warc.gz",
        lambda most: gzip.compress(
            warc_record("response", b"HTTP/1.1 200 OK\r\n\r\n" + page(fill(most - 1000, "<p>x</p>")).encode()), 1
        ),
        False,
    ),
}
KINDS = {".jsonl": {"kind": "jsonl"}, ".html": {"kind": "tree", "suffixes": [".html"]}, ".gz": {"kind": "warc"}}


def test_memory_is_at_most_a_multiple_of_the_largest_document(tmp_path):
    most, cases = 20_000_000, []
    for name, (file, make, _) in LARGE.items():
        folders = [tmp_path / name / size for size in ("small", "large")]
        for folder, size in zip(folders, (3000, most), strict=True):
            folder.mkdir(parents=True)
            (folder / file).write_bytes(make(size))
        cases.append((*folders, {"max_document_bytes": most, **KINDS[Path(file).suffix]}))
    for (name, (_, _, kept)), cost in zip(LARGE.items(), costs_of_reading(*cases), strict=True):
        assert cost.documents == kept, name
        assert cost.grown <= MULTIPLE * most + ROOM, name


def test_rows_that_repeat_a_dictionary_s_value_are_bounded_by_batch_and_by_file(tmp_path):
    """A megabyte in 4000 rows is 4 GB of documents in a file of some kilobytes."""
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for folder, size in (("small", 10), ("large", 1_000_000)):
        (tmp_path / folder).mkdir()
        column = arrow.DictionaryArray.from_arrays(arrow.array([0] * 4000, arrow.int32()), ["x" * size])
        parquet.write_table(arrow.table({"text": column}), tmp_path / folder / "a.parquet", compression="zstd")
    options = {"kind": "parquet", "max_document_bytes": 2_000_000}
    (cost,) = costs_of_reading((tmp_path / "small", tmp_path / "large", options))
    assert cost.grown < MULTIPLE * 2_000_000 + ROOM
    assert cost.documents == max(2_000_000, 200 * (tmp_path / "large/a.parquet").stat().st_size) // 1_000_000
    (record,) = [json.loads(line) for line in (tmp_path / "large/quarantine/00000.jsonl").open()]
    assert record["reason"] == "bomb"


HTML = {
    "siblings": lambda n: "<i></i>" * (n // 7),
    "paragraphs": lambda n: "<p>x" * (n // 4),
    "list items": lambda n: f"<ul>{'<li>x' * (n // 5)}</ul>",
    "cells": lambda n: f"<table>{'<tr><td>x<td>y' * (n // 14)}</table>",
    "nested blocks": lambda n: "<div>" * (n // 5),
    "nested lists": lambda n: "<ol>" * (n // 4),
    "attributes of a tag": lambda n: f"<p {' '.join(f'a{i}' for i in range(n // 7))}>x</p>",
    "attributes without spaces": lambda n: "<p " + "".join(f'a{i}=""' for i in range(n // 9)) + ">x</p>",
    "attributes parted by slashes": lambda n: "<p/" + "/".join(f"a{i}" for i in range(n // 7)) + ">x</p>",
    "attributes behind a bracket": lambda n: '<p b=">" ' + " ".join(f"a{i}" for i in range(n // 7)) + ">x</p>",
    "tags without an end": lambda n: "<p a='" + "<p a=x " * (n // 7),
    "comments": lambda n: "<!---->" * (n // 7),
    "entities": lambda n: "&amp;" * (n // 5),
}
JSON = {
    "keys": lambda n: '{"text": "a", "text": "b"' + "".join(f', "{i}": 1' for i in range(n // 12)) + "}",
    "one key": lambda n: '{"text": "a"' + ', "text": 1' * (n // 11) + "}",
    "quotes": lambda n: '{"text": "a", "x": ' + '"",' * (n // 3),
    "escapes": lambda n: '{"text": "' + '\\",' * (n // 3) + '"}',
}


def takes_the_square(work, size: int) -> bool:
    """Whether a quarter of what takes long takes less than a tenth as long: by the square it would be a sixteenth."""
    return seconds(work, size) > 1 and seconds(work, size // 4) < seconds(work, size) / 10


def seconds(work, size: int) -> float:
    began = time.process_time()
    work(size)
    return time.process_time() - began


@pytest.mark.parametrize("make", HTML.values(), ids=HTML)
def test_time_grows_with_the_size_of_a_page(make):
    assert not takes_the_square(lambda n: extract(page(make(n)).encode(), "utf-8", 10**8), 400_000)


@pytest.mark.parametrize("make", JSON.values(), ids=JSON)
def test_time_grows_with_the_size_of_a_line(tmp_path, make):
    from io import BytesIO

    wanted = source(tmp_path, kind="jsonl")
    assert not takes_the_square(lambda n: list(read_jsonl(BytesIO(make(n).encode()), wanted)), 400_000)


def test_time_grows_with_the_size_of_a_file_whose_records_claim_what_follows(tmp_path):
    """Each record says that it goes on to the end of the file."""
    record = warc_record("conversion", b"Words. " * 100)
    head, _, rest = record.partition(b"Content-Length: 700")
    assert rest

    def work(size: int) -> None:
        folder = tmp_path / str(size)
        folder.mkdir(exist_ok=True)
        (folder / "a.warc").write_bytes((head + b"Content-Length: 99999999" + rest) * (size // len(record)))
        read(tmp_path, crawl=source(folder, kind="warc"))

    assert not takes_the_square(work, 4_000_000)


def test_what_ordinary_pages_and_lines_hold_is_no_problem(tmp_path):
    """At the bounds themselves, and attributes whose values look like many."""
    most = 10**8
    assert structure_problem("<p>" * FEWEST_TAGS, 1) is None
    assert structure_problem("<p>" * (FEWEST_TAGS + 1), 1)[0] == "too_many_elements"
    assert structure_problem(f"<p {'a ' * MOST_ATTRIBUTES}>", most) is None
    assert structure_problem(f"<p {'a ' * (MOST_ATTRIBUTES + 1)}>", most)[0] == "too_many_attributes"
    assert structure_problem(f"<p title='{'a=b ' * 5000}' style=\"{'x: y; ' * 5000}\">" * 10, most) is None
    assert structure_problem("<p a=1 b=2>" * 5000, most) is None
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": "a, b: [c], {d} " * 50_000})
        + "\n"
        + json.dumps({"text": "words", "x": [1] * (FEWEST_VALUES - 8)}, separators=(",", ":"))
    )
    documents, quarantine = read(tmp_path, web=source(tmp_path, kind="jsonl", max_document_bytes=10**6))
    assert len(documents) == 2
    assert not quarantine


def test_a_page_that_takes_too_long_is_named_and_the_next_is_read(tmp_path, monkeypatch):
    """The extractor is one that sleeps: what makes the real one slow is refused before."""
    slow = tmp_path / "data_pipeline/pages"
    slow.mkdir(parents=True)
    for folder in (slow.parent, slow):
        (folder / "__init__.py").touch()
    (slow / "worker.py").write_text(
        "import sys, time, struct\n"
        "header, answer = struct.Struct('>HQQ'), struct.Struct('>BQ')\n"
        "while head := sys.stdin.buffer.read(header.size):\n"
        "    label, page, most = header.unpack(head)\n"
        "    data = sys.stdin.buffer.read(label + page)\n"
        "    if b'slow' in data: time.sleep(60)\n"
        "    if b'crash' in data: sys.exit(3)\n"
        "    sys.stdout.buffer.write(answer.pack(0, 5) + b'words')\n"
        "    sys.stdout.buffer.flush()\n"
    )
    monkeypatch.setattr(client, "ROOT", tmp_path)
    extractor = client.Extractor()
    monkeypatch.setattr("data_pipeline.readers.html.EXTRACTOR", extractor)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for name in ("a", "b slow", "c", "d crash", "e"):
        (tmp_path / f"in/{name}.html").write_text(name)
    pages = source(tmp_path / "in", kind="tree", suffixes=[".html"], max_seconds=1)
    documents, quarantine = read(tmp_path, t=pages)
    extractor.close()
    assert list(documents) == ["t/a.html", "t/c.html", "t/e.html"]
    assert quarantine == {"t/b slow.html": "too_slow", "t/d crash.html": "reader_error"}


def test_memory_of_the_extractor_is_bounded_by_the_system():
    """A page of text as large as a document may be takes seven times as much: it is refused, and the next is read."""
    extractor = client.Extractor()
    try:
        body = page(fill(40_000_000, f"<p>{WORDS * 60}</p>")).encode()
        with pytest.raises(client.Refused, match="too_costly"):
            extractor.text(body, "utf-8", most_bytes=len(body), seconds=60)
        assert "words" in extractor.text(page(f"<p>{WORDS}</p>").encode(), None, most_bytes=10**6, seconds=60)
    finally:
        extractor.close()


def test_a_forked_process_asks_an_extractor_of_its_own():
    extractor = client.Extractor()
    ask = lambda: extractor.text(page(f"<p>{WORDS}</p>").encode(), None, most_bytes=10**6, seconds=60)  # noqa: E731
    try:
        ask()
        mine = extractor._process.pid
        if (child := os.fork()) == 0:
            os._exit(not (WORDS.strip() in ask() and extractor._process.pid != mine))
        assert os.waitpid(child, 0)[1] == 0
        assert WORDS.strip() in ask()
        assert extractor._process.pid == mine
    finally:
        extractor.close()
