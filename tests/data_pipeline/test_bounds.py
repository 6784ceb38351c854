"""The bounds of docs/bounds.md: memory by max_document_bytes, time by the size, structure before the costly step."""

import gzip
import itertools
import json
import os
import signal
import time
from operator import attrgetter
from pathlib import Path

import pytest
import zstandard

from data_pipeline import readers
from data_pipeline.pages import client
from data_pipeline.pages.structure import FEWEST_TAGS, MOST_ATTRIBUTES, structure_problem
from data_pipeline.pages.worker import extract
from data_pipeline.readers import limit
from data_pipeline.readers.lines import FEWEST_VALUES, read_jsonl
from tests.data_pipeline.source_factory import read, source, warc_record
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


REPEATED = {  # columns of so many rows, with one value of so many bytes
    "texts": lambda rows, size: {"text": _repeated(rows, "x" * size)},
    "names": lambda rows, size: {"text": ["some words"] * rows, "id": _repeated(rows, "x" * size)},
}


def _repeated(rows: int, value: str):
    import pyarrow

    return pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows, pyarrow.int32()), [value])


def test_rows_that_repeat_a_dictionary_s_value_are_bounded_by_batch_and_by_file(tmp_path):
    """900 kB in 4000 rows are 3.6 GB of documents in a file of some kilobytes."""
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    cases = []
    for name, columns in REPEATED.items():
        for size in (10, 900_000):
            (folder := tmp_path / name / str(size)).mkdir(parents=True)
            parquet.write_table(arrow.table(columns(4000, size)), folder / "a.parquet", compression="zstd")
        options = {"kind": "parquet", "max_document_bytes": 2_000_000}
        cases.append((tmp_path / name / "10", tmp_path / name / "900000", options))
    for (_, folder, _), cost in zip(cases, costs_of_reading(*cases), strict=True):
        assert cost.grown < MULTIPLE * 2_000_000 + ROOM, folder
        assert (folder / "a.parquet").stat().st_size < 2_000_000 // 200
        assert cost.documents == 2
        (record,) = [json.loads(line) for line in (folder / "quarantine/00000.jsonl").open()]
        assert record["reason"] == "bomb", folder


def test_a_footer_above_the_bound_is_not_read(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"text": ["words"], **{f"{n:0100d}": [n] for n in range(50)}}
    parquet.write_table(arrow.table(columns), tmp_path / "a.parquet")
    documents, quarantine = read(tmp_path, p=source(tmp_path, kind="parquet", max_document_bytes=5000))
    assert (documents, quarantine) == ({}, {"p/a.parquet:footer": "too_large"})


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


MANY = {  # name -> (file's suffix, content of about n bytes)
    "gzip members of WARC": (".warc.gz", lambda n: gzip.compress(warc_record("conversion", b"word " * 9)) * (n // 150)),
    "headers of WARC": (
        ".warc",
        lambda n: warc_record("conversion", b"w", "".join(f"a{i}: b\r\n" for i in range(n // 9))),
    ),
    "headers of HTTP": (
        ".warc",
        lambda n: warc_record("response", b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * (n // 6) + b"\r\n<p>x"),
    ),
    "chunks of HTTP": (
        ".warc",
        lambda n: warc_record(
            "response",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * (n // 6) + b"0\r\n\r\n",
        ),
    ),
    "codings of HTTP": (
        ".warc",
        lambda n: warc_record(
            "response", f"HTTP/1.1 200 OK\r\nContent-Encoding: {'gzip,' * (n // 5)}\r\n\r\nx".encode()
        ),
    ),
    "gzip members of JSON": (".jsonl.gz", lambda n: gzip.compress(b'{"text": "a"}\n') * (n // 35)),
    "empty lines": (".jsonl", lambda n: b"\n" * n),
    "frames of zstd": (".jsonl.zst", lambda n: zstandard.compress(b'{"text": "a"}\n') * (n // 23)),
}


@pytest.mark.parametrize(("suffix", "make"), MANY.values(), ids=MANY)
def test_time_grows_with_the_size_of_a_file_of_many_parts(tmp_path, suffix, make):
    kind = "warc" if "warc" in suffix else "jsonl"

    def work(size: int) -> None:
        folder = tmp_path / str(size)
        folder.mkdir(exist_ok=True)
        (folder / f"a{suffix}").write_bytes(make(size))
        read(tmp_path, s=source(folder, kind=kind))

    assert not takes_the_square(work, 400_000)


@pytest.mark.parametrize("columns", [1, 200])
def test_time_grows_with_the_size_of_a_file_of_many_row_groups(tmp_path, columns):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def work(size: int) -> None:
        folder = tmp_path / str(size)
        if not folder.exists():
            folder.mkdir()
            rows = arrow.table({f"c{i}" if i else "text": ["some words"] * (size // columns) for i in range(columns)})
            parquet.write_table(rows, folder / "a.parquet", row_group_size=1)
        read(tmp_path, s=source(folder, kind="parquet"))

    for size in (500, 2000):
        work(size)  # writes the files
    assert not takes_the_square(work, 2000)


def test_rows_without_text_are_bounded_by_file(tmp_path):
    """A file of some kilobytes may hold 2**31 of them, a line of quarantine each."""
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = arrow.table({"text": arrow.nulls(300_000, arrow.string())})
    parquet.write_table(rows, tmp_path / "a.parquet", compression="zstd")
    _, quarantine = read(tmp_path, s=source(tmp_path, kind="parquet", max_document_bytes=100_000, max_expansion=2))
    assert quarantine.pop("s/a.parquet") == "bomb"
    assert set(quarantine.values()) == {"no_text"}
    assert len(quarantine) < 2000


SLOW = {
    "line of JSON": (
        "jsonl",
        "lines.from_record",
        "a.jsonl",
        b'{"text": "a"}\n{"text": "slow"}\n{"text": "c"}\n',
        ":2",
    ),
    "record of WARC": (
        "warc",
        "warc._item",
        "a.warc",
        b"".join(warc_record("conversion", text) for text in (b"a", b"slow", b"c")),
        ":2",
    ),
    "row of Parquet": ("parquet", "parquet._records", "a.parquet", None, ":row group 1"),
}


@pytest.mark.parametrize(("kind", "step", "file", "content", "place"), SLOW.values(), ids=SLOW)
def test_what_takes_too_long_to_decode_is_named_and_the_rest_is_read(
    tmp_path, monkeypatch, kind, step, file, content, place
):
    """Decoding is linear, so the slow one is made up: it computes until it is stopped."""
    real, module = attrgetter(step)(readers), f"data_pipeline.readers.{step.partition('.')[0]}"
    monkeypatch.setattr(f"{module}.cpu_seconds", lambda most: limit.cpu_seconds(most / 10))

    def decode(item, *more):
        while b"slow" in bytes(getattr(item, "block", b"")) or (isinstance(item, dict) and item["text"] == "slow"):
            pass
        return real(item, *more)

    if kind == "parquet":
        arrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(arrow.table({"text": ["a", "slow", "c"]}), tmp_path / file, row_group_size=1)
        whole = parquet.ParquetFile.iter_batches

        def batches(table, row_groups, **more):
            while row_groups == [1]:
                pass
            yield from whole(table, row_groups=row_groups, **more)

        monkeypatch.setattr(parquet.ParquetFile, "iter_batches", batches)
    else:
        (tmp_path / file).write_bytes(content)
        monkeypatch.setattr(f"data_pipeline.readers.{step}", decode)
    documents, quarantine = read(tmp_path, s=source(tmp_path, kind=kind, max_seconds=1))
    assert [text for text, _ in documents.values()] == ["a", "c"]
    assert list(documents) == [f"s/{file}:1", f"s/{file}:3"]
    assert quarantine == {f"s/{file}{place}": "too_slow"}


def test_time_that_a_disk_or_another_program_takes_counts_for_no_document():
    with limit.cpu_seconds(0.05):
        time.sleep(0.2)
    with pytest.raises(limit.TooSlow), limit.cpu_seconds(0.05):
        sum(0 for _ in itertools.count())
    assert signal.getitimer(signal.ITIMER_PROF) == (0, 0)


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
