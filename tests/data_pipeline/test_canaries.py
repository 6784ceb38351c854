"""Planted noise is dropped and good text that looks odd is kept: the floors that every change has to hold."""

import json
import random

import pytest

from data_pipeline.canaries import main, score
from data_pipeline.canary_texts import GOOD, NOISE
from tests.data_pipeline.real_text import write_real_text

PER_KIND = 25


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("canaries")
    write_real_text(folder / "real", 400)
    options = ["pipeline=text", f"input={folder}/real", f"output={folder}/out", f"per_kind={PER_KIND}"]
    options += ["tasks=2", "workers=1", "tokenizer.vocab_size=400", "tokenizer.sample_bytes=100_000"]
    assert main([*options, "shard_tokens=1_000_000"]) == 0
    return folder / "out"


def test_noise_goes_and_good_text_stays(output):
    canaries = json.loads((output / "report.json").read_text())["canaries"]
    for kind, entry in canaries["kinds"].items():
        assert entry["planted"] == PER_KIND
        assert sum(entry["by"].values()) == entry["dropped"]
        if kind in NOISE:
            assert entry["recall"] >= 0.9, (kind, entry)
            assert entry["precision"] >= 0.95, (kind, entry)
            assert entry["precision_with_real"] >= 0.85, (kind, entry)
        else:
            assert entry["lost"] <= 0.04, (kind, entry)  # one of 25
    summary = canaries["summary"]
    assert summary["recall"] >= 0.95, canaries["kinds"]
    assert summary["precision"] >= 0.98
    assert summary["precision_with_real"] >= 0.95
    assert summary["odd_good_text_lost"] <= 0.02, canaries["kinds"]
    assert summary["real_text_lost"] <= 0.02


def test_each_stage_has_its_recall_and_precision(output):
    canaries = json.loads((output / "report.json").read_text())["canaries"]
    stages = canaries["stages"]
    noise = [entry for kind, entry in canaries["kinds"].items() if kind in NOISE]
    assert stages["rules"]["reached"] == PER_KIND * len(NOISE)
    for entry in stages.values():
        for key in ("reached", "dropped"):
            assert sum(kind[key] for kind in entry["kinds"].values()) == entry[key]
    reached, dropped = ([entry[key] for entry in stages.values()] for key in ("reached", "dropped"))
    assert [*reached[1:], reached[-1] - dropped[-1]] == [a - b for a, b in zip(reached, dropped, strict=True)]
    assert sum(dropped) == sum(entry["dropped"] for entry in noise)
    # Rules cannot know that a text is there twice, and deduplication takes that alone.
    assert stages["rules"]["recall"] >= 0.95 * (len(NOISE) - 1) / len(NOISE)
    in_rules = stages["rules"]["kinds"]
    assert all(in_rules[kind]["recall"] >= 0.9 for kind in NOISE if kind != "near_duplicate"), stages
    assert stages["near_duplicates"]["kinds"]["near_duplicate"]["recall"] >= 0.95
    for stage in ("rules", "near_duplicates"):
        assert stages[stage]["precision"] >= 0.98
        assert stages[stage]["precision_with_real"] >= 0.95
        took = [entry for entry in stages[stage]["kinds"].values() if entry["dropped"]]
        assert all(entry["precision"] >= 0.95 and entry["precision_with_real"] >= 0.85 for entry in took), stages
    assert in_rules["near_duplicate"]["precision"] is None  # nothing was taken: no precision


def test_every_good_document_that_goes_counts_against_the_rule_that_took_it(tmp_path):
    """Counted by hand: noise, odd-looking and real documents, taken by rules and as duplicates."""
    ids = {"boilerplate/0": 1, "boilerplate/1": 2, "keyboard/0": 3, "poetry/0": 4, "code/0": 5}
    kinds = [*NOISE, *GOOD]
    lines = [{"id": identity, "text": ""} for identity in ids]
    lines += [{"id": f"{kind}/9", "text": ""} for kind in kinds if kind not in ("boilerplate", "keyboard")]
    folder = tmp_path / "out.canaries"
    folder.mkdir()
    (folder / "canaries.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    taken = {"boilerplate/0": "boilerplate", "poetry/0": "boilerplate", "keyboard/0": "words"}
    drops = [{"id": f"canaries/canaries.jsonl:{ids[name]}", "filter": rule} for name, rule in taken.items()]
    drops += [{"id": "web/1", "filter": "boilerplate"}, {"id": "web/2", "filter": "language"}]
    for stage, records in {
        "rules": drops,
        "near_duplicates": [
            {"id": f"canaries/canaries.jsonl:{ids['code/0']}", "filter": "near_duplicate"},
            {"id": "web/3", "filter": "near_duplicate"},
        ],
    }.items():
        (tmp_path / "out/drops" / stage).mkdir(parents=True)
        path = tmp_path / "out/drops" / stage / "00000.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    report = {"stages": [{"sources": {"web": {"documents": 10}, "canaries": {"documents": len(lines)}}}]}
    (tmp_path / "out/report.json").write_text(json.dumps(report))
    found = score(tmp_path / "out")
    noise = 3 + len(NOISE) - 2
    assert found["summary"] == {
        "recall": 2 / noise,
        "precision": 2 / 3,  # the poem
        "precision_with_real": 2 / 5,  # and two of the real documents; the third goes as a duplicate
        "odd_good_text_lost": 1 / 2 / len(GOOD),
        "real_text_lost": 2 / 10,
    }
    assert found["kinds"]["boilerplate"]["recall"] == 1 / 2
    assert found["kinds"]["boilerplate"]["precision"] == 1 / 2
    assert found["kinds"]["boilerplate"]["precision_with_real"] == 1 / 3
    assert found["kinds"]["keyboard"]["precision_with_real"] == 1
    assert found["kinds"]["mojibake"]["precision"] is None
    assert (found["kinds"]["poetry"]["lost"], found["kinds"]["code"]["lost"]) == (1 / 2, 0)
    assert found["stages"]["rules"]["recall"] == 2 / noise
    assert found["stages"]["near_duplicates"]["precision"] is None
    assert found["stages"]["near_duplicates"]["reached"] == noise - 2


def test_each_kind_is_caught_by_the_rule_made_for_it(output):
    kinds = score(output)["kinds"]
    for kind, rules in {
        "mojibake": {"garbled"},
        "near_duplicate": {"near_duplicate", "exact_duplicate"},
        "machine_log": {"logs", "symbols"},  # some are mostly digits
        "repeated": {"repetition"},
        "boilerplate": {"boilerplate"},
        "shuffled_words": {"broken_sentences", "word_order"},
    }.items():
        assert sum(kinds[kind]["by"].get(rule, 0) for rule in rules) >= 0.8 * kinds[kind]["planted"], (
            kind,
            kinds[kind],
        )


def test_the_page_shows_them(output):
    page = (output / "report.html").read_text()
    assert "<h2>Canaries</h2>" in page
    assert all(f"<td>{kind}</td>" in page for kind in (*NOISE, *GOOD))
    assert "<th>stage</th>" in page
    assert "<td>rules</td>" in page


@pytest.mark.parametrize("make", {**NOISE, **GOOD}.values(), ids={**NOISE, **GOOD})
def test_a_canary_follows_from_its_seed(make):
    text = "The old mill's by the river. It has not turned for years, and nobody knows why. " * 12
    assert make(text, random.Random(1)) == make(text, random.Random(1))
    assert len({make(text, random.Random(seed)) for seed in range(8)}) > 1
    assert make(text, random.Random(1)) != text


@pytest.mark.parametrize(
    ("option", "message"),
    [("per_kind=0", "per_kind=0"), ("per_kind=x", "per_kind=x"), ("per_kind=9999", "per_kind=9999 needs 19998")],
)
def test_bad_input_is_one_clear_line(tmp_path, option, message, capsys):
    write_real_text(tmp_path / "real", 3)
    assert main(["pipeline=text", f"input={tmp_path}/real", f"output={tmp_path}/out", option]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "out").exists()
