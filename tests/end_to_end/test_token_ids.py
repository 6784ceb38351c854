"""A tokenizer whose special tokens have other ids than this project's: training, generation and export take its ids."""

import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_pipeline.shards.manifest import Manifest, token_dtype
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.tokenizer import describe
from megatron_tn.convert import main as convert
from megatron_tn.evaluate import main as evaluate
from megatron_tn.generate import main as generate
from megatron_tn.loading import load_tokenizer
from megatron_tn.score import main as score
from megatron_tn.train import main as train
from tests.helpers.shards import make_text_shards
from tests.helpers.training import SMALL, call, train_forked

END = "<|end|>"  # as in GPT-2's tokenizer, one entry begins, ends and pads, and is the last
SENTENCES = [f"The {a} {b}." for a in ("old", "new", "red", "odd") for b in ("cat", "dog", "hen", "ant")]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """manifest.json of documents of one sentence; the tokenizer.json beside it cuts and pads to 3 tokens, and
    drops most merges."""
    folder = tmp_path_factory.mktemp("foreign")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_special_tokens([END])
    encoded = [tokenizer.encode(text).ids for text in SENTENCES]
    tokenizer.model.dropout = 0.9
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=3)
    tokenizer.save(str(folder / "tokenizer.json"))
    info = describe(folder / "tokenizer.json", bos=END, eos=END, pad=END)
    assert info.bos == info.vocab_size - 1
    with ShardWriter(folder, "part", dtype=np.dtype(token_dtype(info.vocab_size)), shard_tokens=4000) as writer:
        for number in range(300):
            ids, text = encoded[number % len(SENTENCES)], SENTENCES[number % len(SENTENCES)]
            writer.write(np.array([info.bos, *ids, info.eos]), id=f"d{number}", source="test", text_bytes=len(text))
    manifest = Manifest.create(folder, info, writer.shards)
    manifest.save()
    return folder / "manifest.json"


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    settings = (*SMALL, f"data.manifest={shards}", "engine=local", "engine.precision=fp32", "schedule.steps=60")
    train_forked(1, *settings, "data.global_batch=8", "data.micro_batch=8", "optim.lr=2e-2", f"run_dir={folder}")
    return folder


def test_a_run_takes_the_tokenizers_ids_and_ends_where_a_document_ends(run, shards, capsys):
    end = Manifest.load(shards).tokenizer.eos
    model = json.loads((run / "config.json").read_text())["model"]
    assert [model[f"{name}_id"] for name in ("bos", "eos", "pad")] == [end] * 3
    prompt = "The old cat. The red"
    assert call(generate, f"checkpoint={run}", f"prompt={prompt}", "temperature=0", "device=cpu") == 0
    said = capsys.readouterr().out
    assert said.startswith(prompt)  # which has more tokens than the 3 that the file cuts to
    assert len(said) < 60
    assert call(evaluate, f"checkpoint={run}", f"manifest={shards}", "device=cpu", "json=true") == 0
    assert json.loads(capsys.readouterr().out)["checkpoint"] == str(run)


def test_an_output_that_is_no_utf8_is_said_at_the_start(run, monkeypatch, caplog):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    prompt = ("prompt=na\u00efve", "temperature=0", "max_new_tokens=1", "device=cpu")
    assert call(generate, f"checkpoint={run}", *prompt) == 0
    assert "standard output takes ascii" in caplog.text
    assert written.getvalue().startswith(b"na\\xefve")


def test_scores_that_cannot_be_written_are_refused_at_the_start(run, shards, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != shards.parent)
    assert call(score, f"checkpoint={run}", f"manifest={shards}", "device=cpu") == 2
    assert f"scores are written beside it, and {shards.parent} is read-only" in capsys.readouterr().err


def test_an_export_names_them_and_its_tokenizer_neither_cuts_nor_pads(run, shards, tmp_path):
    assert call(convert, "export", f"checkpoint={run}", f"output={tmp_path}") == 0
    values, end = json.loads((tmp_path / "config.json").read_text()), Manifest.load(shards).tokenizer.eos
    assert [values[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [end] * 3
    exported = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert exported.truncation is None
    assert exported.padding is None


def test_a_text_that_spells_a_special_token_is_text(run):
    tokenizer = load_tokenizer("", str(run))
    ids = tokenizer.encode(END, add_special_tokens=False).ids
    assert tokenizer.token_to_id(END) not in ids
    assert tokenizer.decode(ids) == END


def test_ids_and_shards_of_another_tokenizer_are_refused(run, shards, tmp_path, capsys):
    make_text_shards(tmp_path, vocab_size=390)
    settings = (*SMALL, f"data.manifest={shards}", "schedule.steps=60", f"run_dir={tmp_path / 'none'}")
    assert call(train, *settings, "model.eos_id=5") == 2
    assert (
        f"model.eos_id=5 is not the id {Manifest.load(shards).tokenizer.eos} of the tokenizer that made"
        in capsys.readouterr().err
    )
    assert call(train, *settings, f"evaluation.manifest={tmp_path / 'manifest.json'}") == 2
    assert "were made with different tokenizers" in capsys.readouterr().err
    theirs = f"manifest={tmp_path / 'manifest.json'}"
    assert call(evaluate, f"checkpoint={run}", theirs, "device=cpu") == 2
    assert "was made with another tokenizer than" in capsys.readouterr().err
    imported = tmp_path / "imported"
    assert call(convert, "import", f"checkpoint={run}", f"output={imported}") == 0
    first = imported / "checkpoints" / "step_00000000"
    for words in ((f"init_from={run}", f"run_dir={tmp_path / 'none'}"), (f"run_dir={imported}",)):
        assert call(train, *SMALL, f"data.{theirs}", "schedule.steps=60", *words) == 2
        said = capsys.readouterr().err
        assert f"error: data.{theirs} was made with another tokenizer than " in said
        assert said.endswith(f", that of {words[0] if len(words) > 1 else f'checkpoint={first}'}\n")
