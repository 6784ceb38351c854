"""Shards on disk: damage is named by `verify`, hostile files are refused by name."""

import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import webdataset

from data_pipeline.errors import InputError
from data_pipeline.files import replace_file, sha256_of
from data_pipeline.shards import Manifest, read_documents
from data_pipeline.shards.content import token_dtype
from data_pipeline.shards.index import build_index, parse_index
from data_pipeline.shards.tar import TarWriter
from data_pipeline.shards.verify import main, verify
from data_pipeline.shards.writer import ShardWriter
from tests.data_pipeline.shard_factory import make_shards


@pytest.fixture
def manifest(tmp_path):
    return make_shards(tmp_path, documents=40)


def load(manifest):
    return Manifest.load(manifest.directory / "manifest.json")


def shard_path(manifest, number=1):
    return manifest.directory / manifest.shards[number].name


def edit(manifest, change):
    """Rewrites manifest.json after `change(record)`."""
    path = manifest.directory / "manifest.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def test_whole_shards_verify_and_read_back(manifest, capsys):
    assert verify(load(manifest)) == []
    assert main([str(manifest.directory / "manifest.json"), "--workers=1"]) == 0
    assert "40 documents" in capsys.readouterr().out
    documents = list(read_documents(manifest))
    assert len(documents) == 40
    assert sum(len(document.tokens) for document in documents) == manifest.totals.tokens


@pytest.mark.parametrize("count", [0, 1, 9])
def test_an_archive_is_the_one_that_webdataset_writes(count):
    ours, theirs = io.BytesIO(), io.BytesIO()
    writer, other = TarWriter(ours), webdataset.TarWriter(theirs, user="", group="", mtime=0, encoder=False)
    for number in range(count):
        sample = {"json": b"{}" * number, "tokens": bytes(512 * number)}
        for name, data in sample.items():
            writer.write(f"train-00000_{number:07d}.{name}", data)
        other.write({"__key__": f"train-00000_{number:07d}", **sample})
    writer.finish()
    other.close()
    assert ours.getvalue() == theirs.getvalue()


def test_plain_webdataset_reads_the_shards(manifest):
    urls = [str(shard_path(manifest, number)) for number in range(len(manifest.shards))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    for sample, document in zip(samples, read_documents(manifest), strict=True):
        assert np.array_equal(np.frombuffer(sample["tokens"], "<u2"), document.tokens)
        assert json.loads(sample["json"]) == document.metadata


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_the_smallest_dtype_holds_the_vocabulary(tmp_path, vocab_size, dtype):
    assert token_dtype(vocab_size) == dtype
    manifest = make_shards(tmp_path, documents=5, vocab_size=vocab_size)
    assert manifest.dtype == np.dtype(dtype)
    assert verify(manifest) == []


def test_a_token_that_does_not_fit_is_an_error_and_leaves_nothing(tmp_path):
    def write():
        with ShardWriter(tmp_path, "s", dtype=np.dtype("uint16"), shard_tokens=100) as writer:
            writer.write(np.array([1, 5, 2]), id="a", source="s", text_bytes=1)
            writer.write(np.array([1, 70_000, 2]), id="d0", source="s", text_bytes=1)

    with pytest.raises(ValueError, match=r"'d0'.*uint16"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_equal_documents_make_equal_bytes(manifest, tmp_path):
    again = make_shards(tmp_path / "again", documents=40)
    assert again.content_hash == manifest.content_hash
    assert [sha256_of(shard_path(again, n)) for n in range(len(again.shards))] == [s.sha256 for s in manifest.shards]


def truncate(path):
    os.truncate(path, path.stat().st_size - 512)


def alter(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "kind", "at_load"),
    [(truncate, "truncated", True), (alter, "altered", False), (os.unlink, "missing", True)],
    ids=["truncated", "altered", "missing"],
)
def test_damage_is_named(manifest, damage, kind, at_load, capsys):
    damage(shard_path(manifest))
    problems = verify(Manifest.load(manifest.directory / "manifest.json", check_files=False))
    assert len(problems) == 1
    assert f"shard {manifest.shards[1].name}: {kind}" in problems[0]
    assert main([str(manifest.directory / "manifest.json"), "--workers=1"]) == 1
    if at_load:
        with pytest.raises(InputError, match=f"shard {manifest.shards[1].name}: {kind}"):
            load(manifest)


def test_an_altered_index_is_named(manifest):
    path = manifest.directory / manifest.shards[0].index
    index = np.load(path)
    index[[0, 1]] = index[[1, 0]]
    np.save(path, index)
    assert "index" in verify(manifest)[0]


def test_an_altered_tokenizer_is_named(manifest):
    (manifest.directory / "tokenizer.json").write_text("{ }")
    assert "tokenizer.json: altered" in verify(manifest)[0]


def test_duplicates_are_named(manifest):
    shutil.copy(shard_path(manifest), manifest.directory / "copy.tar")
    assert verify(manifest) == ["shard copy.tar: lies beside the manifest, which does not list it"]

    def list_copy(record):
        record["shards"].append(record["shards"][1] | {"name": "copy.tar", "index": "copy.index.npy"})

    edit(manifest, list_copy)
    with pytest.raises(InputError, match="duplicated shard: sha256="):
        load(manifest)


def write_documents(directory, *shards):
    """A manifest of shards of documents (id, tokens), whole and consistent."""
    manifest = make_shards(directory, documents=5)
    written = []
    for number, documents in enumerate(shards):
        with ShardWriter(directory, f"own{number}", dtype=manifest.dtype, shard_tokens=10_000) as writer:
            for identity, tokens in documents:
                writer.write(np.array([1, *tokens, 2]), id=identity, source="s", text_bytes=3)
        written += writer.shards
    for shard in manifest.shards:
        (directory / shard.name).unlink()
    manifest = Manifest.create(directory, manifest.tokenizer, written)
    manifest.save()
    return manifest


def test_doubled_documents_are_named_within_a_shard_and_across(tmp_path):
    """By two workers as by none."""
    first, second = [("a", [7, 8]), ("b", [9]), ("a", [5])], [("c", [9]), ("b", [6])]
    manifest = write_documents(tmp_path, first, second)
    doubled = [
        "shard own0-00000.tar: document 'a' is twice in it",
        "shard own1-00000.tar: document 'b' is already in own0-00000.tar",
    ]
    assert verify(manifest) == doubled
    same = "shard own1-00000.tar: document 'c' has the text of 'b' in own0-00000.tar"
    assert [verify(manifest, workers=n, content=True) for n in (1, 2)] == 2 * [[*doubled, same]]


def test_workers_find_the_same_in_the_same_order(manifest):
    alter(shard_path(manifest, 0))
    truncate(shard_path(manifest, 2))
    os.unlink(shard_path(manifest, 3))
    assert len(found := verify(manifest, workers=2)) == 3
    assert found == verify(manifest, workers=1)


def test_verify_s_arguments(manifest, capsys):
    assert main([str(manifest.directory / "manifest.json"), "--workers=0"]) == 2
    assert "--workers=0 must be at least 1" in capsys.readouterr().err
    assert main([str(manifest.directory / "manifest.json"), "--workers=1", "--content"]) == 0


def test_metadata_nested_too_deep_is_refused(manifest):
    path = shard_path(manifest, 0)
    with tarfile.open(path, "w") as tar:
        data = b"[" * 100_000 + b"]" * 100_000
        info = tarfile.TarInfo("a.json")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    with pytest.raises(InputError, match="not JSON"):
        build_index(path, 2)


@pytest.mark.parametrize("name", ["../x.tar", "/etc/passwd", "a/b.tar", ".hidden", "pipe:cat x", "a\x00b", ""])
@pytest.mark.parametrize("field", ["name", "index", "file"])
def test_a_name_that_leads_elsewhere_is_refused(manifest, field, name):
    edit(manifest, lambda r: (r["tokenizer"] if field == "file" else r["shards"][0]).update({field: name}))
    with pytest.raises(InputError, match=field):
        load(manifest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(version=1), "version=1"),
        (lambda r: r.update(extra=1), "extra"),
        (lambda r: r.pop("dtype"), "dtype"),
        (lambda r: r.update(dtype="uint32"), "vocab_size=5000 needs"),
        (lambda r: r["totals"].update(tokens=3), "totals"),
        (lambda r: r["shards"][0].update(tokens="9"), "tokens='9'"),
        (lambda r: r["shards"][0].update(tokens=-9), "tokens=-9"),
        (lambda r: r["tokenizer"].update(eos=5000), "tokenizer.eos=5000 is not below vocab_size=5000"),
        (lambda r: r.update(directory="/etc"), "directory"),
        (lambda r: r["shards"][0].update(source="x"), "sources="),
        (lambda r: r["sources"]["random"].update(epochs=-1), "epochs=-1"),
        (lambda r: r["sources"]["random"].update(epochs=float("inf")), "epochs=inf"),
        (lambda r: r["shards"][0].update(tokens=10**30), f"tokens={10**30}"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_manifest_that_contradicts_itself_is_refused(manifest, change, message, capsys):
    edit(manifest, change)
    with pytest.raises(InputError, match=message):
        load(manifest)
    assert main([str(manifest.directory / "manifest.json")]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", pickle.dumps({"a": 1})], ids=["empty", "cut", "bytes", "pickle"]
)
def test_what_is_no_manifest_is_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(InputError, match=r"manifest\.json"):
        Manifest.load(tmp_path / "manifest.json")
    with pytest.raises(InputError, match="No such file"):
        Manifest.load(tmp_path / "absent.json")
    with pytest.raises(InputError, match=r"it is a folder; name the file .*manifest\.json"):
        Manifest.load(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "manifest.json").symlink_to("/proc/self/mem")  # as of a bad disk: reading it fails
    for path, problem in (
        (tmp_path / "manifest.json", "Input/output error"),
        (tmp_path, "it is a folder; name the ma"),
    ):
        with pytest.raises(InputError, match=f"manifest={path}: {problem}"):
            Manifest.load(path)


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickled_index_is_refused_and_never_run(manifest, tmp_path):
    shard, victim = manifest.shards[0], tmp_path / "victim"
    for save in (
        lambda path: np.save(path, np.array([[Bomb(victim)] * 3], dtype=object), allow_pickle=True),
        lambda path: path.write_bytes(pickle.dumps(Bomb(victim))),
    ):
        path = manifest.directory / shard.index
        save(path)
        with pytest.raises(InputError, match=shard.index):
            parse_index(path.read_bytes(), shard, itemsize=2)
        assert verify(manifest)
    assert not victim.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.__setitem__((0, 0), 10**12),
        lambda index: index.__setitem__((0, 0), -512),
        lambda index: index.__setitem__((0, 1), 2**62),
        lambda index: index.__setitem__((slice(None), 1), 0),
    ],
    ids=["beyond", "negative", "overflow", "empty"],
)
def test_an_index_that_points_outside_is_refused(manifest, change):
    shard = manifest.shards[0]
    path = manifest.directory / shard.index
    index = np.load(path)
    change(index)
    np.save(path, index)
    with pytest.raises(InputError, match=shard.index):
        parse_index(path.read_bytes(), shard, itemsize=2)


def hostile_tar(path, member, content=None):
    """A good document followed by `member`, a TarInfo."""
    with tarfile.open(path, "w") as tar:
        for name, data in (("a.json", b'{"tokens": 2, "bytes": 0}'), ("a.tokens", b"\1\0\2\0")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        tar.addfile(member, io.BytesIO(content or b"x" * member.size))


def member(name, kind=tarfile.REGTYPE, target="", size=0):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    return info


@pytest.mark.parametrize(
    ("hostile", "message"),
    [
        (member("../x.tokens"), r"'\.\./x\.tokens' leads out"),
        (member("b/../../x.json"), "leads out"),
        (member("/etc/x.json"), "'/etc/x.json' leads out"),
        (member("..\\x.json"), "leads out"),
        (member("b.tokens", tarfile.SYMTYPE, "/etc/passwd"), "'b.tokens' is a link"),
        (member("b.tokens", tarfile.LNKTYPE, "a.tokens"), "'b.tokens' is a link"),
        (member("b.tokens", tarfile.CHRTYPE), "not a plain file"),
        (member("b", tarfile.DIRTYPE), "not a plain file"),
        (member("a.json", size=3), "duplicate key"),
        (member("a.tokens", size=4), "duplicate key"),
        (member("b.pkl", size=4), "not one .json followed by"),
        (member("b.json", size=4), "not JSON"),
    ],
    ids=lambda value: f"{value.name}-{value.type.decode()}" if isinstance(value, tarfile.TarInfo) else "",
)
def test_a_hostile_member_is_refused_by_name(manifest, hostile, message):
    hostile_tar(path := shard_path(manifest, 0), hostile)
    with pytest.raises(InputError, match=message):
        build_index(path, 2)
    # The same when manifest and hash agree with the hostile file.
    digest, size = hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size
    edit(manifest, lambda r: r["shards"][0].update(sha256=digest, size=size))
    assert any(manifest.shards[0].name in problem for problem in verify(load(manifest)))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (b'{"tokens": 2, "bytes": 1000000000000000000000000000000}', "more than"),
        (b'{"tokens": 2, "bytes": 0, "language": "zh-Hant-TW"}', "language='zh-Hant-TW' is not an ASCII code"),
    ],
    ids=["number", "language"],
)
def test_metadata_that_no_index_can_hold_is_refused_by_name(tmp_path, metadata, message):
    hostile_tar(path := tmp_path / "x.tar", member("b.json", size=len(metadata)), metadata)
    with pytest.raises(InputError, match=f"shard x.tar: member 'b.json': .*{message}"):
        build_index(path, 2)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "manifest.json"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"


def test_indexes_are_read_by_many_threads_at_once(manifest):
    """numpy's own reader parses Python source, which two threads of Python 3.11 cannot do at once."""
    from concurrent.futures import ThreadPoolExecutor

    shard = manifest.shards[0]
    path = manifest.directory / shard.index
    expected = parse_index(path.read_bytes(), shard, itemsize=2)
    with ThreadPoolExecutor(8) as pool:
        for index in pool.map(lambda _: parse_index(path.read_bytes(), shard, itemsize=2), range(2000)):
            assert np.array_equal(index, expected)
