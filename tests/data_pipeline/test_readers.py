"""Every kind of source gives its documents; what is none is named, counted, quarantined, and the rest goes on."""

import gzip
import json
import lzma
import os
import sys
import zipfile

import pytest
import zstandard

from data_pipeline.config import compose
from data_pipeline.errors import InputError
from data_pipeline.readers import list_source
from data_pipeline.run import main, run
from data_pipeline.shards import Manifest, read_documents
from tests.data_pipeline.corpus import prose
from tests.data_pipeline.source_factory import PAGE, read, response, source, warc_record


@pytest.mark.parametrize(
    ("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".zst", zstandard.compress)], ids=["plain", "gz", "zst"]
)
def test_json_lines_in_every_compression(tmp_path, suffix, pack):
    lines = b"\n".join(json.dumps({"text": prose(n), "id": n}).encode() for n in range(3))
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(lines))
    documents, quarantine = read(tmp_path, web=source(tmp_path, kind="jsonl", language="en"))
    name = f"a.jsonl{suffix}"
    metadata = {"source": "web", "language": "en"}
    assert documents == {f"web/{name}:{n + 1}": (prose(n), {**metadata, "key": str(n)}) for n in range(3)}
    assert not quarantine


BAD_LINES = {
    "not json": (b"{broken", "not_json"),
    "a list": (b"[1]", "not_json"),
    "undecodable": (b'{"text": "a\xff"}', "not_json"),
    "lone surrogate": (b'{"text": "\\ud800"}', "not_json"),
    "number": (b'{"text": 3}', "no_text"),
    "no text": (b'{"x": ""}', "no_text"),
    "empty": (b'{"text": ""}', "empty"),
    "blank": (b'{"text": " \\n "}', "empty"),
    "duplicate key": (b'{"text": "a", "text": "b"}', "duplicate_key"),
    "a name twice": (b'{"text": "a", "id": 1, "id": 2}', "duplicate_key"),
    "too large": (b'{"text": "' + b"x" * 5000 + b'"}', "too_large"),
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_quarantined_and_the_next_is_read(tmp_path, line, reason):
    good = json.dumps({"text": 'said "text": twice'}).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([good, line, good, b"", good]))
    documents, quarantine = read(tmp_path, web=source(tmp_path, kind="jsonl", max_document_bytes=3000))
    assert list(documents) == ["web/a.jsonl:1", "web/a.jsonl:3", "web/a.jsonl:5"]
    assert quarantine == {"web/a.jsonl:2": reason}


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_a_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}\r\n')
    documents, quarantine = read(tmp_path, web=source(tmp_path, kind="jsonl"))
    assert [text for text, _ in documents.values()] == ["one", "two"]
    assert not quarantine


def damage_second_member(first, second):
    broken = bytearray(gzip.compress(second))
    broken[len(broken) // 2] ^= 0xFF
    return gzip.compress(first) + bytes(broken)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl.gz", damage_second_member(b'{"text": "one"}\n', os.urandom(4000).hex().encode())),
        ("a.jsonl.gz", gzip.compress(b'{"text": "one"}\n') + b"garbage"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "one"}\n' + os.urandom(9000).hex().encode())[:-700]),
        ("a.jsonl.zst", zstandard.compress(b'{"text": "one"}\n') + b"garbage"),
        ("a.jsonl.zst", zstandard.compress(b'{"text": "one"}\n') + zstandard.compress(os.urandom(9000))[:-700]),
        ("a.jsonl.zst", zstandard.compress(b'{"text": "one"}\n')[:-5]),
        ("a.jsonl.xz", lzma.compress(b'{"text": "one"}\n')[:30] + bytes(30)),
    ],
    ids=["corrupt member", "garbage after a member", "cut off", "corrupt zst", "cut frame", "cut zst", "corrupt xz"],
)
def test_a_corrupt_compressed_file_gives_what_came_before_and_its_name(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    (tmp_path / "b.jsonl").write_text('{"text": "two"}')
    documents, quarantine = read(tmp_path, web=source(tmp_path, kind="jsonl"))
    assert "two" in [text for text, _ in documents.values()]
    assert quarantine[f"web/{name}"] == "unreadable"


MANY_FRAMES = {  # suffix -> (packer, what may stand between frames)
    ".zst": (zstandard.compress, b"\x50\x2a\x4d\x18\x04\x00\x00\x00skip"),
    ".xz": (lzma.compress, bytes(8)),
}


@pytest.mark.parametrize("suffix", MANY_FRAMES)
def test_a_file_of_many_frames_is_read_to_its_end(tmp_path, suffix):
    """As `cat` and parallel packers make them, empty and skippable frames among the others."""
    pack, between = MANY_FRAMES[suffix]
    lines = [json.dumps({"text": prose(n)}).encode() + b"\n" for n in range(30)]
    frames = [pack(line) for line in lines]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(between.join([*frames, pack(b"")]) + between)
    documents, quarantine = read(tmp_path, web=source(tmp_path, kind="jsonl"))
    assert [text for text, _ in documents.values()] == [prose(n) for n in range(30)]
    assert not quarantine


def test_a_frame_that_needs_much_memory_is_refused(tmp_path):
    """Both of a few bytes, with a window of 256 MiB."""
    packer = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(window_log=28)
    ).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(packer.compress(b'{"text": "words"}\n') + packer.flush())
    packed = bytearray(lzma.compress(b'{"text": "words"}\n', lzma.FORMAT_ALONE))
    packed[1:5] = (256 << 20).to_bytes(4, "little")
    (tmp_path / "a.jsonl.lzma").write_bytes(packed)
    documents, quarantine = read(tmp_path, web=source(tmp_path, kind="jsonl"))
    assert (documents, quarantine) == ({}, dict.fromkeys(("web/a.jsonl.zst", "web/a.jsonl.lzma"), "unreadable"))


def test_a_zip_archive_is_named_and_not_taken_for_its_first_file(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.jsonl.zip", "w") as archive:
        archive.writestr("one.jsonl", '{"text": "one"}')
        archive.writestr("two.jsonl", '{"text": "two"}')
    (tmp_path / "b.jsonl").write_text('{"text": "three"}')
    documents, quarantine = read(tmp_path, web=source(tmp_path, kind="jsonl"))
    assert list(documents) == ["web/b.jsonl:1"]
    assert quarantine == {"web/a.jsonl.zip": "unreadable"}


def test_a_tree_of_pages_markdown_and_packed_files(tmp_path):
    (tmp_path / "page.html").write_text(PAGE)
    (tmp_path / "latin.htm").write_bytes(
        "<p>Düsseldorf hält große Bäume für schön, und zwar sehr.</p>".encode("latin-1")
    )
    (tmp_path / "empty.html").write_text("<html><body><script>x()</script></body></html>")
    (tmp_path / "notes.md").write_text("# Notes\n\n* `code` and $x^2$\n")
    (tmp_path / "more.txt.gz").write_bytes(gzip.compress(b"packed text"))
    (tmp_path / "void.txt").write_text(" \n")
    (tmp_path / "bytes.txt").write_bytes(b"good \xff bad")
    suffixes = [".html", ".htm", ".md", ".txt", ".txt.gz"]
    documents, quarantine = read(tmp_path, t=source(tmp_path, kind="tree", suffixes=suffixes))
    texts = {name.removeprefix("t/"): text for name, (text, _) in documents.items()}
    assert "The pear tree in the garden bears fruit & shade" in texts["page.html"]
    assert "def eat(pear):\n    return None" in texts["page.html"]
    assert not any(word in texts["page.html"] for word in ("hidden", "About us", "<", "Imprint"))
    assert "Düsseldorf hält große Bäume für schön" in texts["latin.htm"]
    assert texts["notes.md"] == "# Notes\n\n* `code` and $x^2$\n"
    assert texts["more.txt.gz"] == "packed text"
    assert texts["bytes.txt"] == "good \ufffd bad"
    assert set(texts) == {"page.html", "latin.htm", "notes.md", "more.txt.gz", "bytes.txt"}
    assert quarantine == {"t/empty.html": "empty", "t/void.txt": "empty"}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_warc_pages_and_texts(tmp_path, packed):
    records = [
        warc_record("warcinfo", b"software: x"),
        warc_record("response", response(PAGE.encode(), "text/html; charset=utf-8")),
        warc_record("response", response(b"\x89PNG", "image/png")),
        warc_record("conversion", "Ein Text über Birnen.".encode()),
        warc_record("response", response(b"<html></html>", "text/html")),
        warc_record("response", response(PAGE.encode() * 100, "text/html")),
    ]
    data = b"".join(gzip.compress(record) if packed else record for record in records)
    (tmp_path / ("a.warc.gz" if packed else "a.warc")).write_bytes(data)
    documents, quarantine = read(tmp_path, crawl=source(tmp_path, kind="warc", max_document_bytes=20_000))
    texts = [text for text, _ in documents.values()]
    assert len(texts) == 2
    assert "bears fruit & shade" in texts[0]
    assert texts[1] == "Ein Text über Birnen."
    assert {metadata["key"] for _, metadata in documents.values()} == {"http://pears.example/"}
    assert sorted(quarantine.values()) == ["empty", "media_type", "too_large"]


@pytest.mark.parametrize("damage", ["corrupt", "cut off"])
def test_a_corrupt_warc_member_leaves_what_came_before(tmp_path, damage):
    good = gzip.compress(warc_record("response", response(PAGE.encode(), "text/html")))
    broken = bytearray(gzip.compress(warc_record("response", response(os.urandom(3000).hex().encode(), "text/html"))))
    if damage == "corrupt":
        broken[60:90] = b"\xff" * 30
    else:
        del broken[-300:]
    (tmp_path / "a.warc.gz").write_bytes(good + bytes(broken))
    documents, quarantine = read(tmp_path, crawl=source(tmp_path, kind="warc"))
    assert "bears fruit & shade" in documents["crawl/a.warc.gz:1"][0]
    assert set(quarantine.values()) == {"unreadable"}
    assert len(documents) == 1


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"text": ["one", "", None, PAGE], "id": ["a", "b", "c", "d"], "other": [1, 2, 3, 4]})
    parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-30])
    documents, quarantine = read(tmp_path, p=source(tmp_path, kind="parquet"))
    assert documents["p/a.parquet:1"] == ("one", {"source": "p", "key": "a"})
    assert documents["p/a.parquet:4"][0] == PAGE
    assert quarantine == {"p/a.parquet:2": "empty", "p/a.parquet:3": "no_text", "p/b.parquet": "unreadable"}
    documents, _ = read(tmp_path, p=source(tmp_path, kind="parquet", html=True, glob="a.parquet"))
    assert "bears fruit & shade" in documents["p/a.parquet:4"][0]


def test_every_arrow_type_that_holds_text_is_read(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    kinds = [arrow.string(), arrow.large_string(), arrow.string_view(), arrow.binary(), arrow.large_binary()]
    kinds += [arrow.binary_view(), arrow.binary(6), arrow.dictionary(arrow.int32(), arrow.string()), arrow.json_()]
    for number, kind in enumerate(kinds):
        cells = [b"sweet " if "binary" in str(kind) else "sweet ", None]
        column = arrow.array(cells[:1] * 2 + cells[1:], arrow.string() if kind == arrow.json_() else None)
        parquet.write_table(arrow.table({"text": column.cast(kind)}), tmp_path / f"{number}.parquet")
    documents, quarantine = read(tmp_path, p=source(tmp_path, kind="parquet"))
    wanted = [f"p/{number}.parquet:{row}" for number in range(len(kinds)) for row in (1, 2)]
    assert {name: text for name, (text, _) in documents.items()} == dict.fromkeys(wanted, "sweet ")
    assert quarantine == {f"p/{number}.parquet:3": "no_text" for number in range(len(kinds))}


def test_names_of_parquet_rows(tmp_path):
    """What is no name of a row costs no row, and is not read."""
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    broken = arrow.array([b"a\xff"], arrow.binary()).view(arrow.string())
    columns = {
        "word": (arrow.array(["a"]).cast(arrow.string_view()), "a"),
        "number": (arrow.array([2**64 - 1], arrow.uint64()), str(2**64 - 1)),
        "repeated": (arrow.array(["a"]).dictionary_encode(), "a"),
        "not UTF-8": (broken, "a\ufffd"),
        "long": (arrow.array(["a" * 10_001]), None),
        "null": (arrow.array([None], arrow.string()), None),
        "nested": (arrow.array([[["a"]]]), None),
        "bytes": (arrow.array([b"\0" * 16], arrow.binary(16)), None),
        "truth": (arrow.array([True]), None),
    }
    for name, (column, _) in columns.items():
        table = arrow.table({"id": column, "text": ["some words"], "text.en": [["other"]]})
        parquet.write_table(table, tmp_path / f"{name}.parquet")
    documents, quarantine = read(tmp_path, p=source(tmp_path, kind="parquet"))
    assert not quarantine
    assert {text for text, _ in documents.values()} == {"some words"}
    assert {id[2:-10]: metadata.get("key") for id, (_, metadata) in documents.items()} == {
        name: key for name, (_, key) in columns.items()
    }


def test_parquet_without_pyarrow_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"sources\.p\.kind=parquet needs the extra parquet: pip install -e "):
        list_source("p", source(tmp_path, kind="parquet"))


def test_sources_keep_their_categories_epochs_and_shards(tmp_path):
    for name, numbers in (("wiki", range(20)), ("web", range(100, 120))):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"text": prose(n)}) for n in numbers]
        (tmp_path / name / "a.jsonl").write_text("\n".join(lines))
    output = tmp_path / "out"
    settings = [
        "pipeline=jsonl",
        f"output={output}",
        "tasks=2",
        "workers=1",
        "tokenizer.vocab_size=400",
        "~sources.main",
        f"sources={{wiki: {{kind: jsonl, path: {tmp_path}/wiki, category: encyclopedia, epochs: 1.5, language: tlh}}, "
        f"web: {{kind: jsonl, path: {tmp_path}/web}}}}",
    ]
    run(compose(settings))
    manifest = Manifest.load(output / "train/manifest.json")
    assert (manifest.sources["wiki"].category, manifest.sources["wiki"].epochs) == ("encyclopedia", 1.5)
    assert {shard.source for shard in manifest.shards} == {"wiki", "web"}
    for document in read_documents(manifest):
        assert document.metadata["language"] == {"wiki": "tlh", "web": "en"}[document.metadata["source"]]


def test_what_is_wrong_with_a_source_is_said_before_the_output_is_bound_to_it(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_text('{"body": "one", "url": "x"}\n{"body": "two", "title": "y"}\n')
    (tmp_path / "in/README").write_text("words")
    command = ["pipeline=jsonl", f"input={tmp_path}/in"]
    assert main([*command, f"output={tmp_path}/out"]) == 2
    note, error = capsys.readouterr().err.splitlines()
    assert "sources.main.text_key=text: no such key in main/a.jsonl; there are body, url, title" in error
    assert "1 files are not read, they do not match glob=**/*.jsonl*: README" in note
    assert not (tmp_path / "out").exists()
    assert main([*command, f"output={tmp_path}/in/deep/out", "sources.main.text_key=body"]) == 2
    assert f"output={tmp_path}/in/deep/out lies inside sources.main.path={tmp_path}/in" in capsys.readouterr().err
    assert not (tmp_path / "in/deep").exists()
