"""What the tokenizer is trained on, category by category, and the proof that every category comes back to the byte."""

import json
import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers

from data_pipeline import tokenizer as tokenizers
from data_pipeline.config import TokenizerSettings, compose
from data_pipeline.run import main, run
from data_pipeline.sample import allot, strata
from data_pipeline.tokenizer import ASCII, SPECIAL
from tests.data_pipeline.corpus import prose
from tests.data_pipeline.source_factory import source

HAN = "学习语言模型的数据需要清洗和去重并且保持原文不变我们用字节回退处理罕见字符"


def chinese(seed: int) -> str:
    generator = random.Random(seed)
    return "。\n".join("".join(generator.choices(HAN, k=30)) for _ in range(12)) + "。\n"


def code(seed: int) -> str:
    return "".join(f"def function_{seed}_{n}(self, value):\n\treturn value[{n}] + {seed}\n\n" for n in range(12))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Overrides: much English, some code, little Chinese, each a source of a category of its own."""
    folder = tmp_path_factory.mktemp("corpus")
    entries = []
    for name, make, count, category in (
        ("web", prose, 60, "web"),
        ("repositories", code, 20, "code"),
        ("baike", chinese, 12, ""),
    ):
        (folder / name).mkdir()
        for number in range(count):
            (folder / name / f"{number}.txt").write_text(make(number))
        entries.append(f"{name}: {{kind: tree, path: {folder / name}, suffixes: [.txt], category: '{category}'}}")
    off = "{length: null, garbled: null, symbols: null, lines: null, logs: null, repetition: null}"
    options = ["~sources.main", f"sources={{{', '.join(entries)}}}", "near_duplicates=null", f"++rules={off}"]
    return ["pipeline=code", *options, "tokenizer.vocab_size=700", "tasks=3", "workers=1", "heldout_fraction=0.2"]


def metadata(output):
    return json.loads((output / "tokenizer.metadata.json").read_text())


def test_every_category_is_sampled_and_comes_back_to_the_byte(corpus, tmp_path):
    weights = "tokenizer.weights={web: 1, code: 1, baike: 2}"
    run(compose([*corpus, weights, "tokenizer.sample_bytes=24_000", f"output={tmp_path}/out"]))
    found = metadata(tmp_path / "out")
    assert found["trained"]
    assert {name: entry["share"] for name, entry in found["sample"].items()} == {
        "baike": 0.5,
        "code": 0.25,
        "web": 0.25,
    }
    for entry in found["sample"].values():
        assert entry["bytes"] <= entry["available_bytes"] * 1.4
        assert entry["bytes"] == pytest.approx(min(entry["wanted_bytes"], entry["available_bytes"]), rel=0.6)
    assert set(found["round_trip"]) == {"web", "code", "baike"}
    assert all(entry["documents"] >= 4 for entry in found["round_trip"].values())
    assert json.loads((tmp_path / "out/report.json").read_text())["tokenizer"] == found

    tokenizer = tokenizers.load(tmp_path / "out/tokenizer.json")
    tokens = tokenizer.encode(chinese(99) + code(99), add_special_tokens=False).tokens
    assert not [token for token in tokens if tokenizers.BYTE.fullmatch(token)]  # every character is an entry
    assert any(len(token) > 1 and token[0] in HAN for token in tokens)
    assert "def" in tokens


def test_the_tokenizer_does_not_depend_on_the_number_of_tasks(corpus, tmp_path):
    for tasks in (1, 4):
        run(compose([*corpus, "tokenizer.sample_bytes=30_000", f"tasks={tasks}", f"output={tmp_path}/{tasks}"]))
    assert (tmp_path / "1/tokenizer.json").read_bytes() == (tmp_path / "4/tokenizer.json").read_bytes()
    assert metadata(tmp_path / "1")["sample"] == metadata(tmp_path / "4")["sample"]


def test_a_tokenizer_smaller_than_asked_for_says_so_in_one_line(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text(prose(0))
    options = ["pipeline=text", f"input={tmp_path}/in", "near_duplicates=null", "tasks=1", "heldout_fraction=0"]
    assert main([*options, "tokenizer.vocab_size=5000", f"output={tmp_path}/out", "workers=1"]) == 0
    (note,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    entries = metadata(tmp_path / "out")["vocab_size"]
    assert entries < 5000
    assert note.startswith(f"note: the tokenizer has {entries} entries, not tokenizer.vocab_size=5000: ")


def test_what_the_rules_drop_or_edit_need_not_come_back(corpus, tmp_path):
    """A tokenizer without bytes knows no control character; edits take them out, rules drop a text full of them."""
    texts = [prose(0) + "A \u200bword\u00ad.\n", prose(1), "\u0007\ufffd" * 200]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    known = Tokenizer(models.BPE({letter: id for id, letter in enumerate([*SPECIAL, *ASCII])}, []))
    known.decoder = decoders.Fuse()
    known.save(str(tmp_path / "known.json"))
    options = ["pipeline=text", f"input={tmp_path}", "near_duplicates=null", "tasks=1", "heldout_fraction=0"]
    options += [f"tokenizer.file={tmp_path}/known.json", f"output={tmp_path.parent}/{tmp_path.name}-out"]
    assert main([*options, "workers=1"]) == 0


def test_a_tokenizer_that_loses_text_is_refused_with_category_document_and_place(corpus, tmp_path, capsys, monkeypatch):
    run(compose([*corpus, f"output={tmp_path}/good"]))
    lossy = Tokenizer.from_file(str(tmp_path / "good/tokenizer.json"))
    lossy.normalizer = normalizers.Lowercase()
    lossy.save(str(tmp_path / "lossy.json"))
    capsys.readouterr()
    assert main([*corpus, f"tokenizer.file={tmp_path}/lossy.json", f"output={tmp_path}/out"]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert not (tmp_path / "out").exists()  # before anything is written
    first = prose(0)[0]
    assert f"tokenizer.file={tmp_path}/lossy.json: category 'web', document 'web/" in error
    assert "does not decode to its own text: from character 0 it is '" + first in error
    assert "and becomes '" + first.lower() in error
    # Where the first documents say nothing, the shards stage does.
    monkeypatch.setattr("data_pipeline.round_trip.round_trip_problem", lambda *_: None)
    assert main([*corpus, f"tokenizer.file={tmp_path}/lossy.json", f"output={tmp_path}/out"]) == 2
    assert f"tokenizer {tmp_path}/out/tokenizer.json: category 'web', document 'web/" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("{web: 1, code: 1}", "tokenizer.weights: no weight for category 'baike' of the sources"),
        ("{web: 1, code: 1, baike: 1, books: 1}", "tokenizer.weights.books: no source has this category"),
        ("{web: 1, code: 0, baike: 1}", "tokenizer.weights.code=0: Input should be greater than 0"),
    ],
)
def test_weights_that_do_not_fit_the_sources_are_refused(corpus, tmp_path, weights, message, capsys):
    assert main([*corpus, f"tokenizer.weights={weights}", f"output={tmp_path}/out"]) == 2
    assert capsys.readouterr().err.strip() == message


def test_what_a_small_category_leaves_goes_to_the_others():
    assert allot(100, {"a": 1, "b": 1, "c": 2}, {"a": 10, "b": 1000, "c": 1000}) == {"a": 10, "b": 30, "c": 60}
    assert allot(100, {"a": 1, "b": 1}, {"a": 10, "b": 20}) == {"a": 10, "b": 20}


def test_a_category_gets_what_training_sees_of_it_but_never_nothing(tmp_path):
    (tmp_path / "0.json").write_text(json.dumps([["a", "en", 9, 900_000], ["b", "zh", 1, 1000], ["c", "", 1, 99_000]]))
    sources = {
        name: source(tmp_path, kind="jsonl", category=f"k{name}", epochs=epochs)
        for name, epochs in (("a", 1.0), ("b", 1.0), ("c", 2.0))
    }
    parts = strata(TokenizerSettings(sample_bytes=10_000), sources, tmp_path, 0.0)
    assert parts["kc"].wanted_bytes / parts["ka"].wanted_bytes == pytest.approx(2 * 99 / 900, rel=1e-3)
    assert parts["kb"].share == pytest.approx(0.02, rel=0.05)
    assert parts["kb"].wanted_bytes == pytest.approx(200, rel=0.05)
