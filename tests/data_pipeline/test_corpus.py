"""A corpus of packages: what was asked for, once, in parts that are corpora by themselves and join to the whole."""

import dataclasses
import hashlib
import io
import json
import subprocess
import tarfile
import zipfile

import numpy as np
import pytest
import yaml

from data_pipeline.config import CONF, compose_settings
from data_pipeline.corpus import packages
from data_pipeline.corpus.join import main as join
from data_pipeline.corpus.make import make_corpus
from data_pipeline.corpus.overlap import overlap
from data_pipeline.corpus.packages import take
from data_pipeline.corpus.parts import deal
from data_pipeline.corpus.pieces import cut
from data_pipeline.corpus.settings import CorpusSettings, Package
from data_pipeline.errors import InputError, StageError
from data_pipeline.shards.content import TokenizerInfo
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.reading import read_documents
from data_pipeline.shards.writer import ShardWriter
from tests.data_pipeline.real_text import write_real_text

ANY = "0" * 64


def wheel(path, files: dict[str, str]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A corpus of three packages in parts of 60 kB at most, and the folder of its packages."""
    folder = tmp_path_factory.mktemp("corpus")
    output = folder / "output"
    (output / "packages").mkdir(parents=True)
    write_real_text(folder / "texts", 100)
    texts = [path.read_text() for path in sorted((folder / "texts").iterdir())]
    given = {}
    chosen = (("manual", "documentation", texts[:50]), ("more", "prose", texts[40:80]), ("last", "code", texts[80:]))
    for name, source, own in chosen:
        path = output / "packages" / f"{name}_1.0.whl"
        wheel(
            path,
            {f"{name}/{number:03d}.txt": text for number, text in enumerate(own)} | {f"{name}/data.bin": "no text"},
        )
        given[name] = {"source": source, "kind": "pypi", "version": "1.0", "licence": "free", "files": ["*.txt"]}
        given[name]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    settings = CorpusSettings(
        output=str(output), packages=given, vocab_size=600, heldout_fraction=0.1, part_bytes=60_000, tasks=2, workers=1
    )
    make_corpus(settings)
    return output, texts


def identities(path) -> list[str]:
    return sorted(document.metadata["id"] for document in read_documents(Manifest.load(path)))


def test_texts_come_once_and_every_part_is_a_corpus_by_itself(made, tmp_path, capsys):
    output, texts = made
    said = json.loads((output / "corpus.json").read_text())
    assert {name: found["files"] for name, found in said["packages"].items()} == {
        "manual": 50,
        "more": 40,
        "last": 20,
    }
    whole = {split: output / "corpus" / split / "manifest.json" for split in ("train", "heldout")}
    ids = {split: identities(path) for split, path in whole.items()}
    assert ids["heldout"]
    assert len(set(ids["train"] + ids["heldout"])) <= len(set(texts))  # ten texts are in both packages
    parts = sorted((output / "parts").glob("part-*.tar"))
    assert len(parts) == len(said["parts"]) > 1
    assert [part.stat().st_size for part in parts] == [found["bytes"] for found in said["parts"]]

    one = tmp_path / "one"
    one.mkdir()
    (one / parts[0].name).write_bytes(parts[0].read_bytes())
    assert join([str(one), str(tmp_path / "joined")]) == 0
    first = identities(tmp_path / "joined/train/manifest.json")
    assert 0 < len(first) < len(ids["train"])
    # Further parts come later; then it is the whole, to the last hash.
    assert join([str(output / "parts"), str(tmp_path / "joined")]) == 0
    assert f"{len(ids['train'])} documents" in capsys.readouterr().out
    for split, path in whole.items():
        joined = Manifest.load(tmp_path / "joined" / split / "manifest.json")
        assert sorted(map(dataclasses.astuple, joined.shards)) == sorted(
            map(dataclasses.astuple, Manifest.load(path).shards)
        )


def test_pieces_have_every_token_once_and_their_bytes(made, tmp_path):
    output, _ = made
    held_out = Manifest.load(output / "corpus/heldout/manifest.json")
    pieces = cut(held_out, 50, tmp_path / "pieces")
    whole, found = {}, {}
    for document in read_documents(held_out):
        whole[document.metadata["id"]] = (document.tokens[1:].tolist(), document.metadata["bytes"])
    for piece in read_documents(Manifest.load(tmp_path / "pieces/manifest.json")):
        assert 2 <= len(piece.tokens) <= 50
        assert piece.tokens[0] == held_out.tokenizer.bos
        tokens, size = found.get(name := piece.metadata["id"].partition("#")[0], ([], 0))
        found[name] = (tokens + piece.tokens[1:].tolist(), size + piece.metadata["bytes"])
    assert found == whole
    assert pieces.totals.text_bytes == held_out.totals.text_bytes


def test_what_held_out_text_shares_with_training_text_is_counted(tmp_path):
    """A document that begins as one of the training text does, and one that is nowhere else."""
    words = np.random.default_rng(0).integers(4, 500, 400)
    for split, documents in (("train", [words[:100], words[100:200]]), ("heldout", [words[80:120], words[300:340]])):
        (tmp_path / split).mkdir()
        (tmp_path / split / "tokenizer.json").write_text("{}")
        info = TokenizerInfo("tokenizer.json", hashlib.sha256(b"{}").hexdigest(), 500, 1, 2, 0)
        with ShardWriter(tmp_path / split, "part", dtype=np.dtype("uint16"), shard_tokens=10_000) as writer:
            for number, own in enumerate(documents):
                writer.write(np.array([1, *own, 2]), id=f"{number}", source="code", text_bytes=9)
        Manifest.create(tmp_path / split, info, writer.shards).save()
    found = overlap(*(Manifest.load(tmp_path / split / "manifest.json") for split in ("train", "heldout")))
    # Of 28 passages of 13 tokens each, the first document has 8 within either of two training documents.
    assert found == {"code": {"passages": 16 / 56, "documents": 2, "over_half": 1}}


def test_joining_says_what_is_wrong(tmp_path, capsys):
    assert join([str(tmp_path), str(tmp_path / "joined")]) == 2
    assert "no part-*.tar" in capsys.readouterr().err
    with tarfile.open(tmp_path / "part-1.tar", "w") as archive:
        entry = tarfile.TarInfo("../evil")
        archive.addfile(entry, io.BytesIO(b""))
    assert join([str(tmp_path), str(tmp_path / "joined")]) == 2
    assert "../evil is no file of a part" in capsys.readouterr().err


def test_a_package_of_another_hash_or_without_files_is_refused(tmp_path):
    package = Package("code", "pypi", "1.0", ANY, "free", ("*.txt",))
    wheel(tmp_path / "made_1.0.whl", {"a.md": "text"})
    with pytest.raises(InputError, match=r"packages.made.sha256=000.*: .*made_1.0.whl has sha256 "):
        packages.fetch({"made": package}, tmp_path)
    with pytest.raises(InputError, match=r"packages.made.files=\['\*.txt'\]: no file of made_1.0.whl matches"):
        take("made", package, tmp_path / "made_1.0.whl", tmp_path / "text", 1.0)


def test_all_packages_that_cannot_be_had_are_named_at_once_with_what_to_do(tmp_path, monkeypatch):
    """The program's last line, or that there is no such program; a package that can be had is kept."""
    commands = {
        "old": ["sh", "-c", "echo no such version >&2; exit 1"],
        "here": ["sh", "-c", "printf text > here.deb"],
        "lost": ["no-such-program"],
    }
    monkeypatch.setattr(packages.shutil, "which", lambda name: name)
    monkeypatch.setattr(packages, "_command", lambda name, package: commands[name])
    debian = Package("code", "debian", "1.0", hashlib.sha256(b"text").hexdigest(), "free", ("*",))
    wanted = {"old": debian, "here": debian, "lost": dataclasses.replace(debian, kind="pypi")}
    with pytest.raises(StageError) as raised:
        packages.fetch(wanted, tmp_path)
    old, lost = str(raised.value).splitlines()
    by_hand = f"put the file that has sha256 {debian.sha256} at {tmp_path}"
    advice = f"refresh the package lists with apt-get update, or {by_hand}/old_1.0.deb"
    assert old == f"packages.old: version 1.0 cannot be downloaded: no such version; {advice}"
    assert lost.startswith("packages.lost: version 1.0 cannot be downloaded: [Errno 2]")
    assert lost.endswith(f"'no-such-program'; {by_hand}/lost_1.0.whl")
    (tmp_path / "old_1.0.deb").write_text("text")
    (tmp_path / "lost_1.0.whl").write_text("text")
    assert [path.read_text() for path in packages.fetch(wanted, tmp_path).values()] == ["text"] * 3
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=r"packages\.\w+\.kind=debian needs the program dpkg-deb"):
        packages.fetch(wanted, tmp_path)


def test_files_of_an_archive_within_a_debian_package_are_taken(tmp_path):
    """What a Debian package of sources holds; links are not followed."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:xz") as archive:
        for name in ("linux/kernel/fork.c", "linux/drivers/net.c"):
            entry = tarfile.TarInfo(name)
            entry.size = 4
            archive.addfile(entry, io.BytesIO(b"int;"))
        link = tarfile.TarInfo("linux/kernel/link.c")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    root = tmp_path / "root"
    (root / "usr/src").mkdir(parents=True)
    (root / "DEBIAN").mkdir()
    (root / "usr/src/linux.tar.xz").write_bytes(inner.getvalue())
    (root / "DEBIAN/control").write_text(
        "Package: l\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: d\n"
    )
    subprocess.run(["dpkg-deb", "--build", root, tmp_path / "l.deb"], check=True, capture_output=True)
    package = Package("code", "debian", "1", ANY, "free", ("linux/kernel/*.c",), inner="*/linux.tar.xz")
    assert take("l", package, tmp_path / "l.deb", tmp_path / "text", 1.0) == {"files": 1, "bytes": 4}
    assert [path.name for path in (tmp_path / "text").rglob("*.*")] == ["fork.c"]


def test_parts_are_alike_in_size_and_sources(made):
    output, _ = made
    shards = list(Manifest.load(output / "corpus/train/manifest.json").shards)
    sizes = {shard.name: 10 for shard in shards}
    groups = deal(shards, sizes, 10 * len(shards) // 2)
    assert sorted(shard.name for group in groups for shard in group) == sorted(sizes)
    assert max(map(len, groups)) - min(map(len, groups)) <= 1
    assert {shard.source for shard in groups[0]} >= {"documentation", "prose"}


def test_every_package_in_conf_is_pinned_and_of_a_known_source():
    listed = yaml.safe_load((CONF / "corpus.yaml").read_text())["packages"]
    found = compose_settings("corpus", ["output=out"], CorpusSettings).packages
    assert len(found) == len(listed) > 50
    assert len({package.sha256 for package in found.values()}) == len(found)
    assert {package.source for package in found.values()} == {"code", "documentation", "prose"}
