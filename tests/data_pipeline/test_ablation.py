"""Corpora of the proof that cleaning pays: gathered, split, planted, cleaned, cut to one size."""

import json
from collections import Counter

import pytest

from data_pipeline.ablation.__main__ import main
from data_pipeline.ablation.gather import Text, gather, package_texts
from data_pipeline.canary_texts import NOISE
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.reading import read_documents
from data_pipeline.tokenizer import load

SMALL = ("packages=[rich,click]", "documentation_bytes=100_000", "source_bytes=150_000", "vocab_size=600", "workers=1")


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation") / "corpora"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_pipeline.ablation.corpora.PARTS", 2)  # tasks of each of 40 stages
        assert main([f"output={folder}", "heldout_fraction=0.1", "noise=0.4", *SMALL]) == 0
    return folder


def texts(output, name) -> dict[str, str]:
    """{key: text} of a corpus."""
    manifest = Manifest.load(str(output / name / "manifest.json"))
    decode = load(manifest.directory / manifest.tokenizer.file).decode
    return {d.metadata["key"]: decode(d.tokens[1:-1].tolist()) for d in read_documents(manifest)}


def test_both_corpora_have_one_size_and_one_tokenizer(output):
    said = json.loads((output / "corpora.json").read_text())
    manifests = {name: Manifest.load(str(output / name / "manifest.json")) for name in ("raw", "cleaned", "heldout")}
    assert len({manifest.tokenizer.sha256 for manifest in manifests.values()}) == 1
    for name in ("raw", "cleaned"):
        longest = max(len(document.tokens) for document in read_documents(manifests[name]))
        assert said["tokens"] - longest < manifests[name].totals.tokens <= said["tokens"]
        assert manifests[name].totals.tokens == said["corpora"][name]["tokens"]


def test_noise_is_planted_equally_and_cleaning_takes_it(output):
    said = json.loads((output / "corpora.json").read_text())
    planted = dict(said["planted"])
    real = planted.pop("real")["bytes"]
    assert set(planted) == set(NOISE)
    for kind, found in planted.items():
        assert found["bytes"] == pytest.approx(real * 0.4 / 0.6 / len(NOISE), rel=0.25), kind
    assert said["corpora"]["raw"]["noise"] > 0.3
    assert said["corpora"]["cleaned"]["noise"] < 0.05
    taken = said["corpora"]["cleaned"]["taken"]
    assert all(taken[kind] >= 0.8 for kind in NOISE), taken
    assert taken["real"] < 0.1
    assert not any(said["corpora"]["raw"]["taken"].values())


def test_held_out_text_is_real_and_in_no_corpus(output):
    heldout = set(texts(output, "heldout").values())
    gathered = {json.loads(line)["text"] for path in output.glob("gathered/*.jsonl") for line in path.open()}
    assert heldout <= gathered
    for name in ("raw", "cleaned"):
        found = texts(output, name)
        real = [text for key, text in found.items() if key.startswith("real/")]
        assert real
        assert set(real) <= gathered
        assert not heldout & set(found.values())


def test_packages_are_listed_with_version_and_size(output):
    import importlib.metadata

    packages = json.loads((output / "corpora.json").read_text())["packages"]
    assert set(packages) == {"rich", "click"}
    counted = Counter()
    for path in output.glob("gathered/*.jsonl"):
        for record in map(json.loads, path.open()):
            counted[record["id"].split("/")[1]] += len(record["text"].encode())
    for name, found in packages.items():
        assert found["version"] == importlib.metadata.version(name)
        assert found["bytes"] == counted[name]


def test_a_stopped_run_goes_on_and_ends_alike(output, capsys, monkeypatch):
    monkeypatch.setattr("data_pipeline.ablation.corpora.PARTS", 2)
    whole = {path: path.read_bytes() for name in ("raw", "cleaned") for path in (output / name).iterdir()}
    whole[output / "corpora.json"] = (output / "corpora.json").read_bytes()
    (output / "corpora.json").unlink()
    (output / "cleaned/manifest.json").unlink()
    assert main([f"output={output}", "heldout_fraction=0.1", "noise=0.4", *SMALL]) == 0
    assert {path: path.read_bytes() for path in whole} == whole
    assert main([f"output={output}", "heldout_fraction=0.1", "noise=0.5", *SMALL]) == 2
    assert "holds corpora with other settings: noise: 0.4 -> 0.5" in capsys.readouterr().err


def test_a_source_is_split_into_docstrings_and_code(tmp_path, monkeypatch):
    source = '"""About the module."""\n\n\ndef double(x):\n    """Twice."""\n    return 2 * x  # not thrice\n'
    (tmp_path / "module.py").write_text(source)
    (tmp_path / "README.md").write_text("# Doubling\n")
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    monkeypatch.setattr("data_pipeline.ablation.gather._files", lambda name: [(p.name, p) for p in tmp_path.iterdir()])
    assert list(package_texts("mine")) == [
        Text("documentation", "mine", "README.md", "# Doubling\n"),
        Text("documentation", "mine", "module.py:1", "About the module."),
        Text("documentation", "mine", "module.py:5", "Twice."),
        Text("source", "mine", "module.py", "\n\ndef double(x):\n    return 2 * x  # not thrice\n"),
    ]


def test_equal_texts_are_taken_once(tmp_path, monkeypatch):
    found = [Text("documentation", "click", f"{number}.md", "The same page twice. " * 40) for number in range(2)]
    monkeypatch.setattr("data_pipeline.ablation.gather.package_texts", lambda name: found)
    taken = gather(tmp_path, {"documentation": 1000, "source": 1000}, ["click"], parts=2)
    assert taken["click"]["documents"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["packages=[nowhere]"], "packages: nowhere is not installed"),
        (["noise=1"], "noise=1"),
        (["nois=0.1"], "did you mean noise?"),
        (["packages=[click]", "documentation_bytes=900_000_000"], "documentation_bytes=900000000: only"),
    ],
    ids=lambda part: part[-1] if isinstance(part, list) else "",
)
def test_bad_input_is_named(tmp_path, capsys, words, message):
    assert main([f"output={tmp_path}/out", *words]) == 2
    assert message in capsys.readouterr().err
