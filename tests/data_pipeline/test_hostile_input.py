"""Input made to do harm: each piece is named and quarantined with its reason, memory and time stay bounded, and the
rest goes on. Damage that is not malicious is in test_readers.py."""

import gzip
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from data_pipeline.config import compose
from data_pipeline.edits import EDITS
from data_pipeline.filters import RULES
from data_pipeline.protected import spans
from data_pipeline.run import main, run
from data_pipeline.shards import Manifest
from tests.data_pipeline.corpus import plant, prose
from tests.data_pipeline.source_factory import PAGE, read, response, source, warc_record
from tests.data_pipeline.test_pipeline import arguments, fingerprint
from tests.helpers.peaks import costs_of_reading

GOOD = b'{"text": "good"}'
LINES = {
    "nested 100 000 deep": (b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not_json"),
    "nested deep with a key twice": (
        b'{"text": "a", "text": "b", "x": ' + b"[" * 1000 + b"]" * 1000 + b"}",
        "not_json",
    ),
    "NaN": (b'{"text": NaN}', "not_json"),
    "infinity": (b'{"text": Infinity}', "not_json"),
    "a number of 5000 digits": (b'{"text": "a", "id": ' + b"9" * 5000 + b"}", "not_json"),
    "a number for a text": (b'{"text": 1e300}', "no_text"),
    "an object for a text": (b'{"text": {"text": "a"}}', "no_text"),
    "undecodable": (b'{"text": "\xff\xfe"}', "not_json"),
}


@pytest.mark.parametrize(("line", "reason"), LINES.values(), ids=LINES)
def test_a_hostile_line_is_named_and_the_next_is_read(tmp_path, line, reason):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([GOOD, line, GOOD]))
    documents, quarantine = read(tmp_path, web=source(tmp_path, kind="jsonl"))
    assert list(documents) == ["web/a.jsonl:1", "web/a.jsonl:3"]
    assert quarantine == {"web/a.jsonl:2": reason}


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("zst", zstandard.compress)], ids=["gz", "zst"])
def test_a_bomb_is_named_and_not_expanded(tmp_path, suffix, pack):
    """A hundred megabytes of zeros behind a good line: reading stops at the bound."""
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(pack(GOOD + b"\n" + bytes(100_000_000)))
    (tmp_path / "b.jsonl").write_bytes(GOOD)
    bounds = {"max_document_bytes": 1_000_000, "max_expansion": 20}
    documents, quarantine = read(tmp_path, web=source(tmp_path, kind="jsonl", **bounds))
    assert set(documents) == {f"web/a.jsonl.{suffix}:1", "web/b.jsonl:1"}
    assert quarantine == {f"web/a.jsonl.{suffix}": "bomb"}
    (record,) = [json.loads(line) for line in (tmp_path / "quarantine/00000.jsonl").open()]
    assert record["detail"] == "expands beyond max_expansion=20, max_document_bytes=1000000"


def test_text_that_packs_well_is_no_bomb(tmp_path):
    lines = b"\n".join(GOOD for _ in range(20_000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    documents, quarantine = read(tmp_path, web=source(tmp_path, kind="jsonl"))
    assert len(documents) == 20_000
    assert not quarantine


def test_documents_far_above_the_bound_cost_no_memory(tmp_path):
    """A line, and a file, of 256 MiB (sparse), behind and before others, where a document may have 10 MB."""
    files, cases = {"a.jsonl": {"kind": "jsonl"}, "b.txt": {"kind": "tree", "suffixes": [".txt"]}}, []
    for name, options in files.items():
        folders = [tmp_path / name / size for size in ("small", "large")]
        for folder, size in zip(folders, (1, 1 << 28), strict=True):
            folder.mkdir(parents=True)
            with (folder / name).open("wb") as file:
                file.write(GOOD + b"\n")
                file.truncate(size + len(GOOD))
                file.seek(0, os.SEEK_END)
                file.write(b"\n" + GOOD)
        cases.append((*folders, {"max_document_bytes": 10_000_000, **options}))
    line, file = costs_of_reading(*cases)
    assert (line.documents, file.documents) == (2, 0)
    assert max(line.grown, file.grown) < 6 * 10_000_000
    for _, large, _ in cases:
        (record,) = [json.loads(text) for text in (large / "quarantine/00000.jsonl").open()]
        assert record["reason"] == "too_large"


def lie(record: bytes, more: int) -> bytes:
    """The record with a Content-Length that is wrong by `more` bytes."""
    head, _, rest = record.partition(b"Content-Length: ")
    length, _, body = rest.partition(b"\r\n")
    return head + b"Content-Length: " + str(int(length) + more).encode() + b"\r\n" + body


@pytest.mark.parametrize("packed", [bytes, gzip.compress], ids=["plain", "gz"])
@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (-100, "false_length"),
        (-10, "false_length"),
        (60, "false_length"),
        (250, "false_length"),
        (10**12, "unreadable"),
    ],
)
def test_a_warc_record_with_a_false_length_is_never_taken_for_a_document(tmp_path, packed, more, reason):
    """And reading goes on behind it, also where it claims all the rest of the file."""
    good = [warc_record("conversion", f"Good text number {n}.".encode()) for n in range(4)]
    long = warc_record("conversion", b"A text that is rather long and has many words. " * 20)
    asked = warc_record("request", b"GET / HTTP/1.1")
    records = [good[0], asked, lie(long, more), *good[1:3], lie(asked, -3), good[3]]
    (tmp_path / "a.warc.gz").write_bytes(b"".join(map(packed, records)))
    (tmp_path / "b.warc").write_bytes(good[0])
    documents, quarantine = read(tmp_path, crawl=source(tmp_path, kind="warc"))
    texts = [text for text, _ in documents.values()]
    assert texts == [f"Good text number {n}." for n in (0, 1, 2, 3, 0)]
    assert quarantine.pop("crawl/a.warc.gz:2") == reason
    (place,) = quarantine  # of the request, behind which a document might have been
    assert place.startswith("crawl/a.warc.gz:byte ")


def test_a_file_of_beginnings_of_records_ends(tmp_path):
    (tmp_path / "a.warc").write_bytes(warc_record("conversion", b"Good text.") + b"\nWARC/1.0 " * 200_000)
    began = time.perf_counter()
    documents, quarantine = read(tmp_path, crawl=source(tmp_path, kind="warc"))
    assert time.perf_counter() - began < 5
    assert list(documents) == ["crawl/a.warc:1"]
    assert quarantine.pop("crawl/a.warc") == "unreadable"
    assert set(quarantine.values()) == {"unreadable"}
    assert len(quarantine) == 1001


HTTP = {
    "no such charset": (response(PAGE.encode(), "text/html; charset=nonsense"), None),
    "a codec that is no charset": (response(PAGE.encode(), "text/html; charset=zlib_codec"), None),
    "not gzip as it says": (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Encoding: gzip\r\n\r\n\x1f\x8b\x08no",
        "undecodable",
    ),
    "chunks that are none": (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nzz\r\n",
        "undecodable",
    ),
    "a bomb": (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Encoding: gzip\r\n\r\n" + gzip.compress(bytes(10**8)),
        "too_large",
    ),
}


@pytest.mark.parametrize(("body", "reason"), HTTP.values(), ids=HTTP)
def test_a_hostile_response_leaves_its_neighbours(tmp_path, body, reason):
    records = [b"A first text.", body, b"A last text."]
    kinds = ["conversion", "response", "conversion"]
    data = b"".join(warc_record(kind, record) for kind, record in zip(kinds, records, strict=True))
    (tmp_path / "a.warc").write_bytes(data)
    documents, quarantine = read(tmp_path, crawl=source(tmp_path, kind="warc", max_document_bytes=1_000_000))
    assert "crawl/a.warc:1" in documents
    assert quarantine.get("crawl/a.warc:2") == reason
    assert ("crawl/a.warc:2" in documents) == (reason is None)
    assert "crawl/a.warc:3" in documents


def test_a_page_of_nested_elements_is_named_at_once(tmp_path):
    """The extractor takes the square of their number: 200 000 took ten minutes."""
    (tmp_path / "deep.html").write_text("<div>" * 200_000 + "text")
    (tmp_path / "wide.html").write_text("<main>" + "<div>Some words of text.</div>" * 5000 + "</main>")
    began = time.perf_counter()
    documents, quarantine = read(tmp_path, t=source(tmp_path, kind="tree", suffixes=[".html"]))
    assert time.perf_counter() - began < 5
    assert list(documents) == ["t/wide.html"]
    assert quarantine == {"t/deep.html": "too_deep"}


def test_a_file_name_that_is_no_text_is_spelled_out(tmp_path):
    for name, data in ((b"\xff.txt", b"words"), (b"\xfe.txt", b"")):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(data)
    documents, quarantine = read(tmp_path, t=source(tmp_path, kind="tree", suffixes=[".txt"]))
    assert list(documents) == [r"t/\xff.txt"]
    assert quarantine == {r"t/\xfe.txt": "empty"}


def test_parquet_of_a_wrong_schema_and_rows_that_are_no_text(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    tables = {
        "absent": arrow.table({"body": ["a", "b"]}),
        "numbers": arrow.table({"text": [1, 2]}),
        "structs": arrow.table({"text": [{"a": 1}]}),
        "bytes": arrow.table({"text": [b"\xff\xfe", b"abc"]}),
        "words": arrow.table({"text": arrow.array(["one", "one"]).dictionary_encode()}),
        "large": arrow.table({"text": ["x" * 100_000]}),
    }
    for name, table in tables.items():
        parquet.write_table(table, tmp_path / f"{name}.parquet", compression="none")
    documents, quarantine = read(tmp_path, p=source(tmp_path, kind="parquet", max_row_group_bytes=50_000))
    assert list(documents) == ["p/bytes.parquet:2", "p/words.parquet:1", "p/words.parquet:2"]
    assert quarantine == {
        "p/absent.parquet": "wrong_schema",
        "p/numbers.parquet": "wrong_schema",
        "p/structs.parquet": "wrong_schema",
        "p/bytes.parquet:1": "undecodable",
        "p/large.parquet:row group 0": "too_large",
    }


@pytest.mark.parametrize("url", ["pipe:touch victim", "pipe://touch victim", "simplecache::pipe://touch victim"])
def test_a_shell_command_is_no_path_anywhere(tmp_path, url, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["pipeline=jsonl", f"input='{url}'", "output=out"]) == 2
    assert main(["output=out", f"tokenizer.file='{url}'"]) == 2
    from data_pipeline.shards.verify import main as verify

    assert verify([f"{url}/manifest.json"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# Each unit, repeated, looks for an end that never comes.
UNITS = [
    *("<script>", "<script ", "<!--", "<!doctype ", "<a b=", "<div ", "<br ", "&amp", "www.", "http://a.", "[a]("),
    *("`", "```\n", "$x", "\\begin{a}", "\\[", "| ", "- ", "\n    x", "!?", "1'000", "\u00c3\u0080", "e\u0301"),
    *("a" * 40 + " ", ".\n", "the of ", "{", "\n\n", " "),
]


def takes_the_square(work: Callable[[str], object], unit: str, length: int) -> bool:
    """Whether, of a text that takes long, a quarter takes less than a tenth as long: a sixteenth, where time grows with
    the square, and a quarter where it grows with the length, however fast the machine is."""
    text = (unit * length)[:length]
    long = seconds(work, text)
    return long > 1 and seconds(work, text[: length // 4]) < long / 10


def seconds(work: Callable[[str], object], text: str) -> float:
    began = time.process_time()
    work(text)
    return time.process_time() - began


@pytest.mark.parametrize("name", [*RULES, *EDITS])
def test_no_rule_and_no_edit_takes_the_square_of_a_hostile_text(name):
    step = {**RULES, **EDITS}[name]()
    for unit in UNITS:
        assert not takes_the_square(step, unit, 400_000), unit


def test_what_takes_the_square_is_told():
    assert takes_the_square(lambda text: re.findall("a*b", text), "a", 80_000)


def test_looking_for_protected_parts_does_not_either():
    """Steps look for them where they have found something to do, which the units alone do not give them."""
    for unit in [*UNITS, "\\(", "$$ x", "~~~\n", "``` ``", "[[", "_ _", "=== =\n", "a | b\n", "\\end{a}", "> ", "\\a{"]:
        assert not takes_the_square(spans, unit, 100_000), unit


@pytest.fixture
def small_disk(tmp_path):
    """A disk with room for half of a run."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a disk needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine does not let root mount")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.full  # test_pipeline has a limit on the size of a file in its place
def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(small_disk, tmp_path, capsys):
    texts = tmp_path / "text"
    plant(texts)
    run(compose(arguments(texts, tmp_path / "undisturbed")))
    output = small_disk / "data"
    capsys.readouterr()
    assert main(arguments(texts, output)) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(r"(output=|stage \w+).*No space left on device.*/disk/data.*; [\d,]+ bytes are free there", error)
    assert not (output / "report.json").exists()
    for path in output.rglob("*.tar"):
        subprocess.run(["tar", "tf", path], check=True, capture_output=True)  # what has its name is whole
    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    assert main(arguments(texts, output)) == 0
    assert fingerprint(output) == fingerprint(tmp_path / "undisturbed")
    assert Manifest.load(output / "train/manifest.json").totals.documents


def test_from_the_command_line_the_rest_goes_on_and_the_report_counts_what_did_not(tmp_path):
    """A source of each kind, of twelve texts, the fourth of which is none."""
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [prose(number) for number in range(48)]
    kinds = {"warc": "false_length", "jsonl": "not_json", "tree": "empty", "parquet": "undecodable"}
    for kind in kinds:
        (tmp_path / kind).mkdir()
    records = [warc_record("conversion", text.encode()) for text in texts[:12]]
    records[3] = lie(records[3], 7)
    (tmp_path / "warc/a.warc").write_bytes(b"".join(records))
    lines = [json.dumps({"text": text}).encode() for text in texts[12:24]]
    lines[3] = LINES["nested 100 000 deep"][0]
    (tmp_path / "jsonl/a.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines)))
    for number, text in enumerate(texts[24:36]):
        (tmp_path / f"tree/{number}.txt").write_text(text if number != 3 else " ")
    cells = [text.encode() if number != 3 else b"\xff" for number, text in enumerate(texts[36:])]
    parquet.write_table(arrow.table({"text": cells}), tmp_path / "parquet/a.parquet")
    sources = ", ".join(f"{kind}: {{kind: {kind}, path: {tmp_path}/{kind}}}" for kind in kinds)
    sources = sources.replace("kind: tree,", "kind: tree, suffixes: [.txt],")
    options = ["tokenizer.vocab_size=400", "tasks=2", "heldout_fraction=0", "~sources.main", f"sources={{{sources}}}"]
    assert main(["pipeline=jsonl", f"output={tmp_path}/out", *options]) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert {name: entry["documents"] for name, entry in report["quarantine"].items()} == dict.fromkeys(
        kinds.values(), 1
    )
    assert report["splits"]["train"]["documents"] == 44
    found = [json.loads(line) for path in (tmp_path / "out/quarantine").glob("*.jsonl") for line in path.open()]
    assert {record["source"]: record["reason"] for record in found} == kinds


@pytest.mark.parametrize(
    ("pipeline", "kind"), [("warc", "warc"), ("jsonl", "jsonl"), ("text", "tree"), ("parquet",) * 2]
)
def test_a_pipeline_reads_its_kind_of_source(pipeline, kind):
    assert compose([f"pipeline={pipeline}", "input=in", "output=out"]).sources["main"].kind == kind
