"""Equal models on two corpora, one of sentences and one of the same tokens in no order, told apart on held-out text."""

import json
import shutil

import numpy as np
import pytest

from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.reading import read_documents
from data_pipeline.shards.writer import ShardWriter
from launch.ablation import main

TINY = (
    "model.embed_dim=32",
    "model.layers=2",
    "model.heads=2",
    "model.glu_dim=48",
    "engine.precision=fp32",
    "data.sequence_length=32",
    "data.global_batch=8",
    "data.micro_batch=8",
    "data.workers=0",
    "optim.lr=2e-2",
    "schedule.steps=24",
    "schedule.warmup_steps=2",
    "evaluation.every=12",
)


@pytest.fixture
def corpora(shards, tmp_path):
    """As data_pipeline.ablation leaves them: `cleaned` is the sentences, `raw` shuffles the tokens of each document."""
    folder = tmp_path / "corpora"
    for name in ("cleaned", "heldout"):
        shutil.copytree(shards.parent, folder / name)
    sentences, generator = Manifest.load(str(shards)), np.random.default_rng(0)
    with ShardWriter(folder / "raw", "part", dtype=sentences.dtype, shard_tokens=4000) as writer:
        for document in read_documents(sentences):
            inner = generator.permutation(document.tokens[1:-1])
            tokens = np.array([document.tokens[0], *inner, document.tokens[-1]])
            record = document.metadata
            writer.write(tokens, id=record["id"], source=record["source"], text_bytes=record["bytes"])
    shutil.copy(sentences.directory / "tokenizer.json", folder / "raw")
    Manifest.create(folder / "raw", sentences.tokenizer, writer.shards).save()
    description = {"vocab_size": sentences.tokenizer.vocab_size, "corpora": {"raw": {}, "cleaned": {}}}
    (folder / "corpora.json").write_text(json.dumps(description))
    return folder


def test_the_better_corpus_wins_and_what_is_done_is_not_done_again(corpora, tmp_path, forked_programs, capsys):
    runs = tmp_path / "runs"
    words = ["--corpora", str(corpora), "--run-dir", str(runs), "--seeds", "1", "--at-once", "2", "--selfclean", *TINY]
    assert main(words) == 0, capsys.readouterr().err
    summary = json.loads((runs / "summary.json").read_text())
    arms = summary["arms"]
    assert list(arms) == ["raw", "cleaned", "selfcleaned"]
    assert all(arm["trained_tokens"] == [24 * 8 * 32] for arm in arms.values())
    assert arms["cleaned"]["mean_perplexity"] < 0.8 * arms["raw"]["mean_perplexity"]
    assert arms["cleaned"]["mean_bits_per_byte"] < arms["raw"]["mean_bits_per_byte"]
    kept, there = arms["selfcleaned"]["self_cleaning"]["kept_of"]["test"]["documents"]
    assert 0.9 * there < kept < there
    filter = json.loads((runs / "selfcleaned-0/config.json").read_text())["data"]["filter"]
    assert filter == str(runs / "selfclean/round_01/filter.json")
    assert (runs / "ablation.png").stat().st_size > 10_000

    logs = {path: path.stat().st_mtime_ns for path in runs.glob("*/console.log")}
    assert len(logs) == 4
    assert main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in runs.glob("*/console.log")} == logs
    assert json.loads((runs / "summary.json").read_text()) == summary

    with pytest.raises(SystemExit):
        main([*words, "optim.lr=1e-2"])
    assert "holds runs on other corpora or with other overrides" in capsys.readouterr().err


def test_a_run_that_fails_is_named_with_its_log_and_ends_the_others(corpora, tmp_path, forked_programs, capsys):
    words = ["--corpora", str(corpora), "--run-dir", str(tmp_path / "runs"), "--seeds", "1", "model.hads=2"]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "python -m megatron_tn.train" in said
    log = tmp_path / "runs/raw-0/console.log"
    assert f"exit code 2; the end of {log}:" in said
    assert "model.heads" in log.read_text()
    assert not (tmp_path / "runs/cleaned-0/console.log").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--seeds", "0"], "--seeds 0 must be at least 1"), (["--at-once", "0"], "--at-once 0 must be at least 1")],
    ids=["seeds", "at-once"],
)
def test_bad_input_is_one_clear_line(corpora, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        main(["--corpora", str(corpora), "--run-dir", str(tmp_path / "runs"), *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_corpora_are_named_with_the_command_that_makes_them(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--corpora", str(tmp_path), "--run-dir", str(tmp_path / "runs")])
    assert "python -m data_pipeline.ablation" in capsys.readouterr().err
