"""The pipeline end to end on a small planted corpus: what it drops, what it writes, and that a kill loses nothing."""

import errno
import gzip
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline import tokenizer as tokenizers
from data_pipeline.config import compose
from data_pipeline.document import in_heldout
from data_pipeline.errors import InputError
from data_pipeline.readers import ReadSources
from data_pipeline.run import check, main, run
from data_pipeline.shards import Manifest, read_documents
from data_pipeline.shards.verify import verify
from data_pipeline.stream import build_stream
from tests.data_pipeline.corpus import plant, prose

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ["tasks=3", "workers=1", "tokenizer.vocab_size=450", "heldout_fraction=0.2", "shard_tokens=6000"]


def arguments(source, output, *more):
    return ["pipeline=text", f"input={source}", f"output={output}", *OPTIONS, *more]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    source = tmp_path_factory.mktemp("corpus") / "text"
    return source, plant(source)


@pytest.fixture(scope="module")
def output(planted, tmp_path_factory):
    output = tmp_path_factory.mktemp("output") / "data"
    run(compose(arguments(planted[0], output)))
    return output


def drops(output):
    return [json.loads(line) for path in sorted(output.glob("drops/*/*.jsonl")) for line in path.open()]


def documents(output):
    """{id: (split, text)} of everything in the shards, decoded."""
    tokenizer, found = tokenizers.load(output / "tokenizer.json"), {}
    for split in ("train", "heldout"):
        manifest = Manifest.load(output / split / "manifest.json")
        assert verify(manifest) == []
        for document in read_documents(manifest):
            assert document.metadata["id"] not in found
            found[document.metadata["id"]] = (split, tokenizer.decode(document.tokens[1:-1].tolist()))
    return found


def fingerprint(output):
    """Hashes of what a run gives its users."""
    files = [path for path in output.rglob("*") if path.is_file() and "work" not in path.parts and path.name != ".lock"]
    return {
        str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name != "pipeline.json"
    }


def test_planted_defects_are_dropped_for_the_right_reason_and_nothing_else_is(planted, output):
    source, expected = planted
    found = {}
    for drop in drops(output):
        beside = {"kept"} if drop["filter"] in ("exact_duplicate", "near_duplicate") else set()
        assert set(drop) == {"id", "source", "bytes", "filter", "measure", "value", "threshold", "excerpt"} | beside
        found.setdefault(drop["filter"], set()).add(drop["id"].removeprefix("main/"))
    for name in ("length", "garbled", "symbols", "repetition"):
        assert found[name] == expected[name]
    for name in ("exact_duplicate", "near_duplicate"):
        assert found[name] < expected[name]
        assert len(found[name]) == 2
    assert set(found) == set(expected)
    kept = {path.name for path in source.iterdir()} - set().union(*found.values())
    assert {identity.removeprefix("main/") for identity in documents(output)} == kept


def test_documents_survive_to_the_byte_on_the_side_that_their_hash_says(planted, output):
    for identity, (split, text) in documents(output).items():
        assert text == (planted[0] / identity.removeprefix("main/")).read_bytes().decode()
        assert (split == "heldout") == in_heldout(text, 0.2)
    assert {split for split, _ in documents(output).values()} == {"train", "heldout"}


def test_report_adds_up(output):
    report = json.loads((output / "report.json").read_text())
    stages = {stage["stage"]: stage for stage in report["stages"]}
    assert stages["read"]["documents"] == 50
    for unit in ("documents", "bytes"):
        gone = sum(entry[unit] for entry in report["drops"].values())
        assert stages["read"][unit] - gone == stages["near"][unit]
    assert stages["near"]["documents"] == sum(split["documents"] for split in report["splits"].values())
    assert stages["near"]["bytes"] == sum(split["text_bytes"] for split in report["splits"].values())


def test_the_stream_reads_what_the_pipeline_wrote(output):
    manifest = Manifest.load(output / "train" / "manifest.json")
    stream = build_stream(manifest, sequence_length=64, seed=0)
    assert stream.batch(range(4)).tokens.max() < manifest.tokenizer.vocab_size == 450


def test_a_complete_run_is_left_alone(planted, output, capsys):
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.tar")}
    assert main(arguments(planted[0], output)) == 0
    assert "already complete" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*.tar")}


def test_workers_do_not_change_a_byte(planted, output, tmp_path):
    run(compose(arguments(planted[0], tmp_path / "again", "workers=2")))
    assert fingerprint(tmp_path / "again") == fingerprint(output)


def test_a_task_without_documents_leaves_the_others_in_place(tmp_path):
    """Seven tasks for six files, one of which has nothing left: places of duplicates are counted by task."""
    source = tmp_path / "text"
    source.mkdir()
    for number, text in enumerate([prose(1), "short", prose(1), prose(2), prose(3), prose(2)]):
        (source / f"{number}.txt").write_text(text)
    run(compose(arguments(source, tmp_path / "data", "tasks=7", "heldout_fraction=0")))
    stored = read_documents(Manifest.load(tmp_path / "data/train/manifest.json"))
    kept = [document.metadata["id"][5] for document in stored]
    assert sorted({"0": "a", "2": "a", "3": "b", "5": "b"}.get(name, name) for name in kept) == ["4", "a", "b"]
    assert not (tmp_path / "data/heldout").exists()


def test_jsonl_and_an_existing_tokenizer(output, tmp_path):
    source = tmp_path / "lines"
    source.mkdir()
    lines = [json.dumps({"id": f"d{n}", "text": prose(n), "url": "x"}) for n in range(6)]
    bad = ["", "{broken", '{"text": 3}', '{"text": ""}', '{"no": "text"}', '{"text": "\\ud800 lone"}']
    (source / "a.jsonl").write_text("\n".join(lines[:3] + bad) + "\n")
    (source / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[3:]).encode()))
    existing = output / "tokenizer.json"
    result = tmp_path / "data"
    override = f"tokenizer.file={existing}"
    run(compose(["pipeline=jsonl", f"input={source}", f"output={result}", *OPTIONS, "heldout_fraction=0", override]))
    stored = list(read_documents(Manifest.load(result / "train" / "manifest.json")))
    assert sorted(document.metadata["key"] for document in stored) == [f"d{n}" for n in range(6)]
    assert stored[0].metadata["id"] == "main/a.jsonl:1"
    quarantined = json.loads((result / "report.json").read_text())["quarantine"]
    assert {reason: entry["documents"] for reason, entry in quarantined.items()} == {
        "not_json": 2,
        "no_text": 2,
        "empty": 1,
    }
    assert (result / "tokenizer.json").read_bytes() == existing.read_bytes()


BAD = {
    "unknown key": ("tokenizer.vocab_sise=3", "did you mean tokenizer.vocab_size?"),
    "unknown rule": ("rules.lenght.min_bytes=3", "did you mean rules.length?"),
    "unknown choice": ("pipeline=txt", "did you mean text?"),
    "wrong value": ("heldout_fraction=2", "heldout_fraction=2: Input should be less than 1"),
    "wrong type": ("tasks=many", "tasks='many'"),
    "a boolean for a number": ("tasks=true", "tasks=True must not be a boolean: it would be read as 1"),
    "a boolean below": ("sources.main.epochs=true", "sources.main.epochs=True must not be a boolean"),
    "vocabulary too small": ("tokenizer.vocab_size=100", "tokenizer.vocab_size=100 must be at least 358"),
    "no such input": ("input=/no/such/folder", "sources.main.path=/no/such/folder: no such folder"),
    "output to a URL": (
        "output=s3://bucket/x",
        "output='s3://bucket/x': is a URL: it must be a local or mounted folder",
    ),
    "a bound below another": (
        "rules.length={min_bytes: 100, max_bytes: 10}",
        "min_bytes=100 must be at most max_bytes=10: nothing would be kept",
    ),
    "no thresholds": (
        "rules.logs=true",
        "rules.logs=True: null turns it off, {} on with its defaults, rules.logs.max_share=... sets one",
    ),
    "a share above 1": ("rules.garbled.max_share=2", "rules.garbled.max_share=2: Input should be less than or equal"),
    "runs of no words": ("rules.repetition.words=0", "rules.repetition.words=0: Input should be greater than or equal"),
    "runs of no marks": ("edits.punctuation.max_run=0", "edits.punctuation.max_run=0: Input should be greater"),
    "no phrase": ("rules.boilerplate.phrases=[]", "rules.boilerplate.phrases=[]: must be one phrase or"),
    "an empty phrase": ("edits.notices.phrases=[a, '']", "none of them empty, all in lower case"),
    "a phrase in capitals": ("rules.placeholder.phrases=[TODO]", "none of them empty, all in lower case"),
    "a language too long to be stored": (
        "sources.main.language=zh-Hant-TW",
        "sources.main.language='zh-Hant-TW': language='zh-Hant-TW' is not an ASCII code of at most 7",
    ),
    "no input": ("input=null", "sources.main.path: missing; give input=FOLDER"),
    "a source of no kind": (
        "sources.b={path: x}",
        "sources.b.kind=None: no such kind: give sources.b={kind: KIND, path",
    ),
    "a source of no such kind": ("sources.b={kind: tre, path: x}", "kind='tre': no such kind; did you mean tree?"),
    "no such tokenizer": ("tokenizer.file=/no/such.json", "tokenizer.file=/no/such.json"),
    "not Hydra's grammar": ("a b", "a b"),
}


@pytest.mark.parametrize(("override", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_clear_line_and_starts_nothing(planted, tmp_path, override, message, capsys):
    assert main(arguments(planted[0], tmp_path / "data", override)) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "data").exists()


def test_all_problems_come_at_once(tmp_path, capsys):
    assert main([f"output={tmp_path}/x", "sources.stdlib.pth=a", "shard_token=1", "workers=0"]) == 2
    errors = capsys.readouterr().err
    for message in ("sources.stdlib.path?", "shard_tokens?", "workers=0"):
        assert message in errors


def test_an_unknown_key_in_a_file_is_refused_the_same_way(tmp_path):
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline.yaml").write_text("defaults: [pipeline: demo, _self_]\noutput: x\n")
    demo = (ROOT / "conf/pipeline/demo.yaml").read_text()
    (tmp_path / "pipeline/demo.yaml").write_text(demo.replace("heldout_fraction:", "heldout_fracton:"))
    with pytest.raises(InputError, match=r"^heldout_fracton: unknown setting; did you mean heldout_fraction\?$"):
        compose([], tmp_path)


def test_another_run_s_output_is_not_overwritten(planted, output, tmp_path, capsys):
    before = fingerprint(output)
    assert main(arguments(planted[0], output, "tokenizer.vocab_size=460")) == 2
    assert "settings.tokenizer.vocab_size: 450 -> 460" in capsys.readouterr().err
    assert fingerprint(output) == before
    (tmp_path / "thesis.tex").write_text("mine")
    assert main(arguments(planted[0], tmp_path)) == 2
    assert "thesis.tex" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("removals", [0, 1, 4, *(pytest.param(n, marks=pytest.mark.full) for n in (2, 3))])
def test_an_overwrite_that_is_interrupted_can_be_done_again_or_undone(planted, output, tmp_path, monkeypatch, removals):
    shutil.copytree(output, copy := tmp_path / "data")
    left, remove = iter(range(removals)), shutil.rmtree

    def remove_some(folder):
        if next(left, None) is None:
            raise KeyboardInterrupt
        remove(folder)

    monkeypatch.setattr("data_pipeline.run.shutil.rmtree", remove_some)
    other = arguments(planted[0], copy, "tokenizer.vocab_size=460", "overwrite=true")
    assert main(other) == 130
    monkeypatch.undo()
    again = other if removals % 2 else arguments(planted[0], copy)
    assert main(again) == 0
    assert (fingerprint(copy) == fingerprint(output)) == (again is not other)


def test_files_that_come_while_a_run_reads_shift_none_to_another_task(planted, tmp_path):
    """Tasks that listed another number of files would read some of them twice, or leave them out."""
    shutil.copytree(planted[0], source := tmp_path / "text")
    settings = compose(arguments(source, tmp_path / "data"))
    record = check(settings)
    (source / "another.txt").write_text(prose(77))
    with pytest.raises(InputError, match="sources: files were added or removed, or have another size"):
        list(
            ReadSources(settings.sources, tmp_path / "quarantine", record["inputs"]["sha256"]).run(rank=1, world_size=3)
        )


def test_a_run_that_could_not_note_its_settings_is_done_again(planted, tmp_path, monkeypatch):
    def full(path, data):
        path.with_name(f"{path.name}.tmp").touch()  # as a kill would leave it
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("data_pipeline.run.replace_file", full)
    assert main(arguments(planted[0], tmp_path / "data")) == 1
    monkeypatch.undo()
    assert main(arguments(planted[0], tmp_path / "data")) == 0


def test_too_little_text_says_what_is_missing(tmp_path, capsys):
    assert (
        main([f"output={tmp_path}/x", "sources.stdlib.minimum_bytes=1_000_000_000_000", "sources.stdlib.fill=[nope]"])
        == 2
    )
    errors = capsys.readouterr().err
    assert "sources.stdlib.minimum_bytes=1000000000000: only" in errors
    assert "package nope" in errors


def test_the_standard_library_is_enough_for_the_demo():
    from data_pipeline.readers import list_source

    files = [file for name, source in compose(["output=x"]).sources.items() for file in list_source(name, source).files]
    assert sum(file.size for file in files) >= 10_000_000
    assert not [file.id for file in files if "site-packages" in file.id or "__pycache__" in file.id]


def test_a_full_disk_stops_with_one_line_and_the_next_run_completes(planted, output, tmp_path):
    """A limit on the size of a file stands for a disk that is full: writing fails in the middle of a stage."""
    again = tmp_path / "data"
    limited = (
        "from data_pipeline.filters.language import identifier; identifier(); "  # it unpacks its model to a file
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)); "
        "from data_pipeline.run import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", limited, *arguments(planted[0], again, "workers=2")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    line = r"^stage \w+, task \d+: .*File too large.*/data.*; [\d,]+ bytes are free there; log: \S+/task_\d+\.log$"
    assert re.search(line, result.stderr, re.MULTILINE)
    assert "Traceback" not in result.stderr
    assert not (again / "report.json").exists()
    run(compose(arguments(planted[0], again)))
    assert fingerprint(again) == fingerprint(output)


def test_a_tokenizer_that_is_not_the_shards_own_is_refused(output, tmp_path):
    shutil.copytree(output / "train", tmp_path / "train")
    (tmp_path / "train/tokenizer.json").write_bytes((output / "tokenizer.json").read_bytes() + b" ")
    with pytest.raises(InputError, match=r"tokenizer tokenizer\.json: altered: its sha256 is"):
        Manifest.load(tmp_path / "train/manifest.json")


def test_another_tokenizer_file_of_the_same_name_is_another_run(planted, output, tmp_path, capsys):
    tokenizer = tmp_path / "tokenizer.json"
    shutil.copy(output / "tokenizer.json", tokenizer)
    options = arguments(planted[0], tmp_path / "data", f"tokenizer.file={tokenizer}")
    run(compose(options))
    tokenizer.write_bytes(tokenizer.read_bytes() + b"\n")
    assert main(options) == 2
    assert "inputs.tokenizer_sha256" in capsys.readouterr().err


def test_edits_are_made_and_recorded_and_the_language_is_kept(tmp_path):
    source = tmp_path / "text"
    source.mkdir()
    for number in range(6):
        (source / f"{number}.txt").write_text(prose(number))
    (source / "0.txt").write_text(prose(0) + "We use cookies.\nSee <b>this</b>!!!!! http://a.example/x\n")
    output = tmp_path / "data"
    run(compose(arguments(source, output, "heldout_fraction=0")))
    records = [json.loads(line) for path in output.glob("edits/*.jsonl") for line in path.open()]
    assert {record["id"] for record in records} == {"main/0.txt"}
    assert {record["edit"]: (record["value"], record["threshold"]) for record in records} == {
        "html": (2, 0),
        "notices": (1, 0),
        "urls": (1, 0),
        "punctuation": (5, 3),
    }
    assert records[0]["bytes_before"] - records[0]["bytes_after"] == len(
        "We use cookies.\n<b></b>!!!! http://a.example/x"
    )
    tokenizer = tokenizers.load(output / "tokenizer.json")
    for document in read_documents(Manifest.load(output / "train/manifest.json")):
        assert document.metadata["language"] == "en"
        if document.metadata["id"] == "main/0.txt":
            assert tokenizer.decode(document.tokens[1:-1].tolist()) == prose(0) + "See this!\n"
    report = json.loads((output / "report.json").read_text())
    assert report["edits"]["urls"] == {"documents": 1, "value": 1}
