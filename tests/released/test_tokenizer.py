"""The tokenizer of an export gives training's ids in transformers, with the project's own kind and with others."""

import dataclasses
import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from data_pipeline import tokenizer as tokenizers
from megatron_tn.config import ConfigError
from megatron_tn.convert import main as convert
from megatron_tn.released.config import config_to_released
from megatron_tn.released.tokenizer import tokenizer_files
from megatron_tn.released.write import save_pretrained
from tests.helpers import hub
from tests.helpers.models import TINY, TRANSFORMER, reference_model
from tests.helpers.training import call

CORPUS = [f"def function_{n}(value):\n    return [value] * {n}  # a heron, an otter and a stoat\n" for n in range(200)]
TEXTS = (
    *CORPUS[:3],
    "",
    "  two   spaces\t\n\n ",
    "<s>names</s> of <pad> special <|endoftext|> entries",
    "Ünïcode: 机器学习 עברית e\u0301 😀\u200d",
    "<0x41> don't , stop . n't",
)


def ours(path):
    """As `data_pipeline` trains it: byte fallback, specials 0, 1, 2."""
    tokenizers.train(lambda: iter(CORPUS), 500).save(str(path))
    return {}


def byte_level(path):
    """GPT-2's kind: one special entry with the last id; saved with truncation, padding, a bos that is added, and the
    dropout of its training."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    made.add_special_tokens(["<|endoftext|>"])
    last = made.token_to_id("<|endoftext|>")
    made.model.dropout = 0.5
    made.enable_truncation(8)
    made.enable_padding(length=32)
    made.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", last)]
    )
    made.save(str(path))
    return {"bos_id": last, "eos_id": last, "pad_id": last}


@pytest.mark.parametrize(
    ("make", "family"), [(ours, None), (byte_level, None), (byte_level, TRANSFORMER)], ids=["ours", "bytes", "llama"]
)
def test_transformers_gives_the_ids_of_training(tmp_path, make, family):
    auto = hub.transformers().AutoTokenizer
    config = dataclasses.replace(family or TINY, vocab_size=600, **make(tmp_path / "of_data.json"))
    export = tmp_path / "export"
    export.mkdir()
    files = tokenizer_files(tmp_path / "of_data.json", config)
    if family is not None:  # transformers may choose a tokenizer's class by the model's
        files["config.json"] = json.dumps(config_to_released(config))
    for name, content in files.items():
        (export / name).write_text(content)
    training, exported = tokenizers.load(tmp_path / "of_data.json"), auto.from_pretrained(export)
    assert (exported.bos_token_id, exported.eos_token_id, exported.pad_token_id) == (
        config.bos_id,
        config.eos_id,
        config.pad_id,
    )
    for text in TEXTS:
        ids = training.encode(text, add_special_tokens=False).ids
        assert exported(text).input_ids == ids
        assert exported.encode(text, add_special_tokens=False) == ids
        assert exported.decode(ids) == training.decode(ids, skip_special_tokens=False)
    assert exported.decode([config.bos_id, *ids, config.eos_id], skip_special_tokens=True) == TEXTS[-1]
    exported.save_pretrained(tmp_path / "again")
    again = auto.from_pretrained(tmp_path / "again")
    assert [again(text).input_ids for text in TEXTS] == [exported(text).input_ids for text in TEXTS]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 101}, r"has 500 entries, but model\.vocab_size=101"),
        ({"vocab_size": 600, "eos_id": 599}, r"model\.eos_id=599 is no entry of tokenizer"),
    ],
    ids=["vocabulary", "no entry"],
)
def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path, change, message):
    ours(tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match=message):
        tokenizer_files(tmp_path / "tokenizer.json", dataclasses.replace(TINY, **change))


@pytest.mark.parametrize("action", ["export", "import"])
@pytest.mark.parametrize(("content", "message"), [("", "has 500 entries, "), ("{", "tokenizer.json cannot be read")])
def test_a_released_folder_with_such_a_tokenizer_is_not_converted(tmp_path, capsys, action, content, message):
    save_pretrained(reference_model(TINY, 1, torch.float32), tmp_path / "released")
    ours(tmp_path / "released" / "tokenizer.json")
    if content:
        (tmp_path / "released" / "tokenizer.json").write_text(content)
    assert call(convert, action, f"checkpoint={tmp_path / 'released'}", f"output={tmp_path / 'new'}") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("content", ["{", "[]", "{}", json.dumps({"model": {"vocab": 3}})])
def test_a_damaged_tokenizer_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read"):
        tokenizer_files(tmp_path / "tokenizer.json", TINY)
