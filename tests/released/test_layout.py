"""The released layout: what is written is read back, and what does not fit is refused by name."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_tn import load_pretrained
from megatron_tn.config import ConfigError
from megatron_tn.released.config import config_from_released, config_to_released
from megatron_tn.released.write import save_pretrained
from tests.helpers.golden import NAMES, golden
from tests.helpers.models import TINY, random_batch, reference_model


@pytest.mark.parametrize(
    "change",
    [{}, {"norm": "rmsnorm"}, {"norm": "layernorm", "absolute_positions": True}, {"decay": "paper"}, {"lrpe": "all"}],
    ids=str,
)
def test_an_exported_model_is_the_same_model(tmp_path, change):
    model = reference_model(dataclasses.replace(TINY, **change), seed=1, dtype=torch.float32)
    save_pretrained(model, tmp_path)
    again = load_pretrained(tmp_path)
    tokens, _ = random_batch(2, 15)
    assert torch.equal(model(tokens).logits, again(tokens).logits)


@pytest.mark.parametrize("name", NAMES)
def test_released_files_survive_a_round_trip(tmp_path, name):
    directory = golden(name).directory
    save_pretrained(load_pretrained(directory), tmp_path)
    assert {k: v.tolist() for k, v in load_file(tmp_path / "model.safetensors").items()} == {
        k: v.tolist() for k, v in load_file(directory / "model.safetensors").items()
    }
    released, written = (json.loads((d / "config.json").read_text()) for d in (directory, tmp_path))
    assert released.items() <= written.items()


def test_decay_rates_are_stored_for_every_layer_and_head():
    rates = config_to_released(TINY)["decay_rates"]
    assert [len(layer) for layer in rates] == [TINY.heads] * TINY.layers
    assert rates[0][0] == pytest.approx(0.5 * 1.00001)


def test_other_decay_rates_are_refused():
    stored = config_to_released(TINY)
    stored["decay_rates"][1][2] *= 1.01
    with pytest.raises(ConfigError, match="stored decay_rates"):
        config_from_released(stored)


def test_absent_decay_rates_mean_the_released_form():
    stored = config_to_released(TINY)
    del stored["decay_rates"], stored["megatron_tn"]
    config = config_from_released(stored)
    assert (config.decay, config.decay_temperature) == ("released", True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": True}, "no biases"),
        ({"linear_act_fun": "gelu"}, "linear_act_fun='gelu'"),
        ({"linear_act_fun": ["silu"]}, "linear_act_fun=\\['silu'\\]"),
        ({"linear_use_lrpe_list": 3}, "linear_use_lrpe_list=3 is not a list of 0 and 1"),
        ({"linear_use_lrpe_list": [1, "x", 0]}, "is not a list of 0 and 1"),
        ({"norm_type": "batchnorm"}, "norm_type='batchnorm'"),
        ({"hidden_dim": 32}, "hidden_dim=32 differs from decoder_embed_dim=64"),
        ({"glu_dim": None}, "no glu_dim"),
        ({"decoder_embed_dim": None}, "no decoder_embed_dim"),
        ({"no_scale_embedding": "false"}, "config.json: no_scale_embedding='false' is not true or false"),
        ({"decoder_layers": "many"}, "decoder_layers='many' is not a whole number"),
        ({"megatron_tn": 3}, "megatron_tn=3 is not a mapping"),
        ({"linear_use_lrpe_list": [1]}, "linear_use_lrpe_list has 1 entries but decoder_layers=2"),
        ({"pad_token_id": "x"}, "config.json: pad_token_id='x' is not a whole number"),
        ({"eos_token_id": [2, 3]}, r"config.json: eos_token_id=\[2, 3\] is not a whole number"),
        ({"vocab_size": True}, "config.json: vocab_size=True is not a whole number"),
        ({"decay_rates": [[1.0], "x"]}, "the stored decay_rates are not those"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_is_not_this_model_is_refused(change, message):
    stored = config_to_released(TINY) | change
    stored = {key: value for key, value in stored.items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        config_from_released(stored)


def edit_weights(directory, edit):
    path = directory / "model.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.pop("model.layers.0.token_mixer.lrpe.theta"), "lrpe.theta is missing"),
        (lambda w: [w.pop(name) for name in list(w) if "l1" in name], r"l1\.weight, and 1 more, are missing"),
        (lambda w: w.update(extra=torch.zeros(1)), "tensor extra is unknown"),
        (lambda w: w.update(extra=torch.zeros(1, dtype=torch.int8)), "extra has type I8, not one of F32, "),
        (
            lambda w: w.update({name: w[name].byte() for name in w if "l1" in name}),
            r"l1\.weight has type torch\.uint8, ",
        ),
        (lambda w: w.update({"model.layers.1.channel_mixer.l1.weight": torch.zeros(95, 64)}), r"has shape \[95, 64\]"),
    ],
    ids=["missing", "some missing", "unknown", "type", "no numbers", "shape"],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, edit, message):
    save_pretrained(reference_model(TINY, seed=1, dtype=torch.float32), tmp_path)
    edit_weights(tmp_path, edit)
    with pytest.raises(ConfigError, match=message):
        load_pretrained(tmp_path)


INDEX = "model.safetensors.index.json"


def index_of(file) -> str:
    """An index that says that `file` holds every tensor."""
    names = dict(reference_model(TINY, seed=1, dtype=torch.float32).named_parameters())
    return json.dumps({"weight_map": dict.fromkeys(names, file)})


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "{", "config.json is damaged"),
        ("config.json", "[]", "config.json is damaged: it holds list"),
        ("config.json", "{}", r"/test_damaged_\S+/config.json has no "),
        ("config.json", '{"model": {}}', r"/config.json is of a run, .*: megatron_tn.loading.load_any_model loads"),
        ("model.safetensors", "{", "model.safetensors is damaged"),
        (INDEX, "{}", "index.json is damaged: it has no weight_map"),
        (INDEX, index_of(3), "index.json is damaged: it has no weight_map"),
        (INDEX, index_of("a.safetensors"), "a.safetensors is missing"),
        (INDEX, index_of("b.safetensors"), "b.safetensors has no tensor"),
    ],
    ids=["no JSON", "no mapping", "no fields", "of a run", "weights", "no map", "no file name", "missing", "elsewhere"],
)
def test_damaged_files_are_named(tmp_path, file, content, message):
    save_pretrained(reference_model(TINY, seed=1, dtype=torch.float32), tmp_path)
    if file == INDEX:
        (tmp_path / "model.safetensors").unlink()
        save_file({"another": torch.zeros(1)}, tmp_path / "b.safetensors")
    (tmp_path / file).write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_pretrained(tmp_path)


def test_a_tensor_that_two_files_have_is_refused(tmp_path):
    """Without an index nothing says which of them is meant."""
    save_pretrained(reference_model(TINY, seed=1, dtype=torch.float32), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    load_pretrained(tmp_path)
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    with pytest.raises(
        ConfigError, match=r"/b\.safetensors has tensor \S+, which another file without an index has, too"
    ):
        load_pretrained(tmp_path)


def test_a_repeated_head_is_accepted(tmp_path):
    save_pretrained(reference_model(TINY, seed=1, dtype=torch.float32), tmp_path)
    edit_weights(tmp_path, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    load_pretrained(tmp_path)


def test_sharded_files_are_read_by_their_index_and_only_inside_the_folder(tmp_path):
    model = reference_model(TINY, seed=1, dtype=torch.float32)
    save_pretrained(model, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(weights)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: weights[name] for name in part}, tmp_path / file)
    index = {name: file for file, part in files.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    tokens, _ = random_batch(1, 5)
    assert torch.equal(load_pretrained(tmp_path)(tokens).logits, model(tokens).logits)
    index[names[0]] = "../a.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(ConfigError, match=r"'\.\./a.safetensors' is not a plain file name"):
        load_pretrained(tmp_path)


def test_an_export_beside_the_shards_of_another_model_is_the_one_that_is_read(tmp_path):
    old, new = (reference_model(TINY, seed=seed, dtype=torch.float32) for seed in (1, 2))
    save_pretrained(old, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    index = dict.fromkeys(dict(old.named_parameters()), "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    save_pretrained(new, tmp_path)
    tokens, _ = random_batch(1, 5)
    assert torch.equal(load_pretrained(tmp_path)(tokens).logits, new(tokens).logits)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_pretrained(tmp_path)
