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
    options = ["pipeline=text", f"input={folder}/real", f"output={folder}/out", f"per_kind={PER_KIND}", "tasks=2"]
    assert main([*options, "tokenizer.vocab_size=400", "shard_tokens=1_000_000", "tokenizer.sample_bytes=100_000"]) == 0
    return folder / "out"


def test_noise_goes_and_good_text_stays(output):
    canaries = json.loads((output / "report.json").read_text())["canaries"]
    for kind, entry in canaries["kinds"].items():
        assert entry["planted"] == PER_KIND
        assert sum(entry["by"].values()) == entry["dropped"]
        if kind in NOISE:
            assert entry["rate"] >= 0.8, (kind, entry)
    assert canaries["summary"]["recall"] >= 0.95, canaries["kinds"]
    assert canaries["summary"]["odd_good_text_lost"] <= 0.02, canaries["kinds"]
    assert canaries["summary"]["real_text_lost"] <= 0.02
    assert canaries["summary"]["precision"] >= 0.98


def test_each_stage_has_its_recall_and_precision(output):
    canaries = json.loads((output / "report.json").read_text())["canaries"]
    stages = canaries["stages"]
    noise = [entry for kind, entry in canaries["kinds"].items() if kind in NOISE]
    assert stages["rules"]["noise_reached"] == PER_KIND * len(NOISE)
    reached, dropped = ([entry[f"noise_{key}"] for entry in stages.values()] for key in ("reached", "dropped"))
    assert [*reached[1:], reached[-1] - dropped[-1]] == [a - b for a, b in zip(reached, dropped, strict=True)]
    assert sum(dropped) == sum(entry["dropped"] for entry in noise)
    # Rules cannot know that a text is there twice, and deduplication takes that alone.
    assert stages["rules"]["recall"] >= 0.95 * (len(NOISE) - 1) / len(NOISE)
    assert stages["near_duplicates"]["by_kind"]["near_duplicate"] >= 0.95 * PER_KIND
    assert all(stages[stage]["precision"] >= 0.98 for stage in ("rules", "near_duplicates")), stages
    assert all(entry["precision"] is None for entry in stages.values() if not entry["noise_dropped"]), stages


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
    [("per_kind=0", "per_kind=0"), ("per_kind=x", "per_kind=x"), ("per_kind=9999", "per_kind=9999: needs 19998")],
)
def test_bad_input_is_one_clear_line(tmp_path, option, message, capsys):
    write_real_text(tmp_path / "real", 3)
    assert main(["pipeline=text", f"input={tmp_path}/real", f"output={tmp_path}/out", option]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "out").exists()
