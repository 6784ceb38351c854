"""Which files of a source are read: in folders, on file systems, web servers and behind links."""

import errno
import functools
import gzip
import json
import os
import re
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from data_pipeline.errors import InputError
from data_pipeline.readers import list_source
from data_pipeline.run import main
from tests.data_pipeline.source_factory import read, source


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
    assert re.search(message, errors[0])
    assert not (tmp_path / "out").exists()


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
