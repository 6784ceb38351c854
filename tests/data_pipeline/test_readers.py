"""Every kind of source gives its documents; what is none is named, counted, quarantined, and the rest goes on."""

import errno
import functools
import gzip
import json
import lzma
import os
import sys
import threading
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import zstandard
from pydantic import TypeAdapter

from data_pipeline.config import compose
from data_pipeline.errors import InputError
from data_pipeline.readers import ReadSources, list_source
from data_pipeline.run import main, run
from data_pipeline.shards import Manifest, read_documents
from data_pipeline.sources import AnySource
from tests.data_pipeline.corpus import prose

PAGE = """<!DOCTYPE html><html><head><title>Head</title><script>var hidden = 1;</script></head><body>
<nav><a href="/">Home</a> <a href="/about">About us</a></nav><main><h1>Pears</h1>
<p>The pear tree in the <b>garden</b> bears fruit &amp; shade, every year, to those who sit under it.</p>
<pre>def eat(pear):
    return None</pre><ul><li>sweet</li><li>sour</li></ul></main>
<footer>Imprint and cookies</footer></body></html>"""


def source(path, **options):
    return TypeAdapter(AnySource).validate_python({"path": str(path), **options})


def read(tmp_path, **sources):
    """Documents {id: (text, metadata)} and quarantine {id: reason} of one task."""
    step = ReadSources(sources, tmp_path / "quarantine")
    documents = {document.id: (document.text, document.metadata) for document in step.run()}
    records = [
        json.loads(line)
        for path in (tmp_path / "quarantine").glob("*.jsonl")
        for line in path.read_bytes().splitlines()
    ]
    assert all(set(record) == {"id", "source", "bytes", "reason", "detail"} for record in records)
    return documents, {record["id"]: record["reason"] for record in records}


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


@pytest.mark.parametrize("kind", ["jsonl", "tree"])
def test_a_folder_that_cannot_be_listed_is_not_left_out(tmp_path, kind, monkeypatch):
    (tmp_path / "shut").mkdir()
    for name in ("a.jsonl", "shut/b.jsonl"):
        (tmp_path / name).write_text('{"text": "one"}')
    listed = os.scandir

    def scandir(path):
        if str(path).endswith("shut"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr("os.scandir", scandir)
    options = {"suffixes": [".jsonl"]} if kind == "tree" else {}
    with pytest.raises(InputError, match=rf"sources\.web\.path={tmp_path}: .*Permission denied: '{tmp_path}/shut'"):
        read(tmp_path, web=source(tmp_path, kind=kind, **options))


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


def warc_record(kind, body, uri="http://pears.example/"):
    form = "application/http; msgtype=response" if kind == "response" else "text/plain"
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {uri}\r\nWARC-Record-ID: <urn:uuid:0>\r\n"
        f"WARC-Date: 2026-01-01T00:00:00Z\r\nContent-Type: {form}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body + b"\r\n\r\n"


def response(body, content_type):
    return b"HTTP/1.1 200 OK\r\nContent-Type: " + content_type.encode() + b"\r\n\r\n" + body


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


@pytest.mark.parametrize("kind", ["tree", "jsonl"])
def test_any_file_system_of_fsspec(tmp_path, kind):
    import fsspec

    memory = fsspec.filesystem("memory")
    folder = f"/readers-{kind}"
    memory.pipe(f"{folder}/deep/a.jsonl.gz", gzip.compress(b'{"text": "one"}\n'))
    memory.pipe(f"{folder}/node_modules/b.txt", b"not this")
    memory.pipe(f"{folder}/b.txt", b"two")
    options = {"suffixes": [".txt"]} if kind == "tree" else {}
    documents, _ = read(tmp_path, r=source(f"memory://{folder}", kind=kind, **options))
    expected = {"tree": {"r/b.txt": "two"}, "jsonl": {"r/deep/a.jsonl.gz:1": "one"}}
    assert {name: text for name, (text, _) in documents.items()} == expected[kind]


@pytest.fixture
def web(tmp_path):
    """The URL of a web server that lists its folder, in which lies crawl/deep/a.jsonl."""
    (tmp_path / "served/crawl/deep").mkdir(parents=True)
    (tmp_path / "served/crawl/deep/a.jsonl").write_text('{"text": "far"}')

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path / "served")) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("path", ["", "/", "/crawl", "/crawl/"])
@pytest.mark.parametrize("kind", ["jsonl", "tree"])
def test_a_web_server_s_folder(web, tmp_path, kind, path):
    pytest.importorskip("aiohttp")
    options = {"suffixes": [".jsonl"]} if kind == "tree" else {}
    documents, _ = read(tmp_path, w=source(web + path, kind=kind, **options))
    (identity,) = documents
    assert identity.removesuffix(":1") == ("w/deep/a.jsonl" if "crawl" in path else "w/crawl/deep/a.jsonl")


@pytest.mark.parametrize("kind", ["jsonl", "tree"])
def test_a_server_that_does_not_answer_is_not_taken_for_an_empty_folder(tmp_path, kind):
    pytest.importorskip("aiohttp")
    with pytest.raises(InputError, match=r"path=http://127\.0\.0\.1:9/x: .*onnect"):
        read(tmp_path, w=source("http://127.0.0.1:9/x", kind=kind))


@pytest.mark.parametrize("name", ["a [2020-21] b", "st*r", "日本"])
def test_a_folder_s_name_is_no_pattern(tmp_path, name):
    for folder in (name, "star", "a 2 b"):
        (tmp_path / folder / "deep").mkdir(parents=True)
        (tmp_path / folder / "deep/a[1].jsonl").write_text('{"text": "of {folder}"}'.replace("{folder}", folder))
    (tmp_path / name / "ab.jsonl").write_text('{"text": "above"}')
    documents, _ = read(tmp_path, web=source(tmp_path / name, kind="jsonl"))
    assert {id: text for id, (text, _) in documents.items()} == {
        "web/ab.jsonl:1": "above",
        "web/deep/a[1].jsonl:1": f"of {name}",
    }
    (tmp_path / name / "b.jsonl").write_text('{"text": "beside"}')
    documents, _ = read(tmp_path, web=source(tmp_path / name, kind="jsonl", glob="b.jsonl"))
    assert list(documents) == ["web/b.jsonl:1"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("pipe:cat /etc/passwd", "pipe: is no file system"),
        ("pipe://cat", "pipe: is no file system"),
        ("nosuch://bucket", "nosuch: is no file system"),
        ("memory://nothing-here", "no such folder|no file"),
    ],
)
@pytest.mark.parametrize("pipeline", ["jsonl", "text"])
def test_a_url_that_is_no_folder_is_refused_before_anything_is_written(tmp_path, pipeline, path, message, capsys):
    assert main([f"pipeline={pipeline}", f"input='{path}'", f"output={tmp_path}/out"]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    import re

    assert re.search(message, errors[0])
    assert not (tmp_path / "out").exists()


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


@pytest.fixture
def disks(tmp_path):
    """A folder of one file, and links in it: to a folder on another disk, to a file in that and to one beside it, to
    itself, to its file."""
    (tmp_path / "in").mkdir()
    (tmp_path / "disk/deep").mkdir(parents=True)
    for place in ("in/a.jsonl", "disk/b.jsonl", "disk/deep/c.jsonl", "d.jsonl"):
        (tmp_path / place).write_text(json.dumps({"text": place}))
    for link, target in (
        ("part", "disk"),
        ("again.jsonl", "disk/b.jsonl"),
        ("d.jsonl", "d.jsonl"),
        ("loop", "in"),
        ("same.jsonl", "in/a.jsonl"),
    ):
        (tmp_path / "in" / link).symlink_to(tmp_path / target)
    return tmp_path


@pytest.mark.parametrize("kind", ["jsonl", "tree"])
def test_links_are_followed_once_and_named(disks, kind):
    where = source(disks / "in", kind=kind, **({"suffixes": [".jsonl"]} if kind == "tree" else {}))
    documents, _ = read(disks, web=where)
    names = ["a.jsonl", "d.jsonl", "part/b.jsonl", "part/deep/c.jsonl"]
    assert [id.removesuffix(":1").removeprefix("web/") for id in documents] == names
    *left, followed = list_source("web", where).notes
    assert f"2 links are followed: part -> {disks}/disk, d.jsonl -> {disks}/d.jsonl" in followed
    for note, link in zip(left, ("loop", "again.jsonl", "same.jsonl"), strict=True):
        assert f"link {link} leads to something already read" in note
    os.mkfifo(disks / "in/pipe.jsonl")
    assert "1 pipes, sockets and devices are not read: pipe.jsonl" in list_source("web", where).notes[-1]
    (disks / "in/gone").symlink_to(disks / "nowhere")
    assert "1 links lead nowhere: gone" in list_source("web", where).notes[-1]
    (disks / "in/gone.jsonl").symlink_to(disks / "nowhere")
    with pytest.raises(InputError, match=r"links that lead nowhere: gone\.jsonl"):
        list_source("web", where)


@pytest.mark.parametrize("kind", ["jsonl", "tree"])
def test_one_file_is_a_source_whatever_its_name(tmp_path, kind, monkeypatch):
    (tmp_path / "notes.of mine").write_text('{"text": "one"}')
    (tmp_path / "b.jsonl").write_text('{"text": "two"}')
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "notes.of mine", "notes.of mine", f"file://{tmp_path}/notes.of mine"):
        documents, _ = read(tmp_path, w=source(path, kind=kind))
        assert [id.removesuffix(":1") for id in documents] == ["w/notes.of mine"]


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
