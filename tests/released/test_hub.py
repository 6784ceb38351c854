"""An export in transformers: every way to compute it agrees with ours, and generation, training and saving work."""

import dataclasses
import runpy
import sys
import types

import pytest
import torch

from megatron_tn import load_pretrained
from megatron_tn.inference.generator import generate
from megatron_tn.inference.sampler import Sampler
from megatron_tn.model.decay import decay_rates
from megatron_tn.released.write import MODELLING, save_pretrained
from tests.helpers import hub
from tests.helpers.golden import golden, relative_to_max
from tests.helpers.models import TINY, random_batch, reference_model, relative_errors

VARIANTS = {
    "released": {},
    "no scale, 6 heads": {"scale_embedding": False, "heads": 6, "embed_dim": 48, "lrpe": "all"},
    "ablations": {"norm": "rmsnorm", "act": "1+elu", "glu_act": "silu", "decay": "paper", "lrpe": "none"},
    "absolute": {"norm": "layernorm", "absolute_positions": True, "lrpe": "none", "decay": "none"},
    "no gate": {"gate": False, "act": "none", "decay": "none"},
}
# Initial values of this spread give a model whose next token depends on its prompt.
LIVELY = dataclasses.replace(TINY, layers=3, init_std=0.2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    hub.transformers()
    folder = tmp_path_factory.mktemp("export")
    save_pretrained(reference_model(LIVELY, seed=1, dtype=torch.float32), folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return hub.load(folder)


@pytest.fixture(params=["kernels", "plain"])
def either(model, request, monkeypatch):
    """The model in our kernels' operators, and in plain PyTorch."""
    if request.param == "plain":
        monkeypatch.setattr(hub.module_of(model), "kernel_gla", None)
    return model


@pytest.mark.parametrize("change", VARIANTS.values(), ids=VARIANTS)
def test_every_way_to_compute_an_export_agrees(tmp_path, change):
    ours = reference_model(dataclasses.replace(TINY, **change), seed=1, dtype=torch.float32)
    save_pretrained(ours, tmp_path)
    tokens, _ = random_batch(2, 150)
    with torch.no_grad():
        wanted = ours(tokens).logits
    for way, logits in hub.logits_by_path(tmp_path, tokens).items():
        assert relative_to_max(logits, wanted) < 1e-5, way


def test_the_released_family_is_computed_as_released(tmp_path):
    example = golden("heads6_noscale")
    save_pretrained(load_pretrained(example.directory), tmp_path)
    with torch.no_grad():
        logits = hub.load(tmp_path)(example.io["input_ids"]).logits
    assert relative_to_max(logits, example.io["logits"]) < 2e-5


@pytest.mark.parametrize("heads", [1, 6, 8, 20])
def test_rates_that_config_json_lacks_are_those_of_the_definition(model, heads):
    released = hub.module_of(model).released_decay_rates
    for layer, layers in ((0, 1), (0, 5), (2, 5), (4, 5)):
        assert released(heads, layer, layers) == decay_rates(heads, layer, layers)


def test_greedy_generation_is_ours(folder, either):
    prompt = random_batch(1, 20, seed=5)[0]
    sampler = Sampler(temperature=0)
    wanted = generate(load_pretrained(folder), prompt.tolist(), max_new_tokens=24, sampler=sampler)[0]
    found = either.generate(prompt, max_new_tokens=24, do_sample=False)[0, prompt.shape[1] :].tolist()
    assert len(set(wanted)) > 5
    assert (found[:-1] if found[-1] == TINY.eos_id else found) == wanted


@pytest.mark.parametrize(
    "options", [{"num_beams": 4, "num_return_sequences": 2}, {"do_sample": True}, {"do_sample": True, "num_beams": 2}]
)
def test_the_cache_changes_nothing(either, options):
    prompt = random_batch(2, 9, seed=5)[0]
    found = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        found.append(either.generate(prompt, max_new_tokens=12, use_cache=use_cache, **options))
    assert torch.equal(*found)


def test_generation_goes_on_from_a_cache(model):
    prompt = random_batch(1, 12, seed=5)[0]
    wanted = model.generate(prompt, max_new_tokens=10, do_sample=False)
    cache = model(prompt[:, :7], use_cache=True).past_key_values
    assert torch.equal(model.generate(prompt, past_key_values=cache, max_new_tokens=10, do_sample=False), wanted)


def test_a_left_padded_batch_is_its_rows(either):
    rows = [random_batch(1, length, seed=length)[0] for length in (3, 11, 80)]
    wanted = [either.generate(row, max_new_tokens=10, do_sample=False)[0, row.shape[1] :] for row in rows]
    padding = [torch.zeros(1, 80 - row.shape[1], dtype=torch.long) for row in rows]
    tokens = torch.cat([torch.cat(pair, dim=1) for pair in zip(padding, rows, strict=True)])
    mask = torch.cat([torch.cat((blank, torch.ones_like(row)), 1) for blank, row in zip(padding, rows, strict=True)])
    found = either.generate(tokens, attention_mask=mask, max_new_tokens=10, do_sample=False)
    for row, alone in zip(found, wanted, strict=True):
        assert row[80 : 80 + len(alone)].tolist() == alone.tolist()


def test_padding_on_the_left_counts_no_position(tmp_path):
    config = dataclasses.replace(TINY, absolute_positions=True, norm="layernorm")
    save_pretrained(reference_model(config, seed=1, dtype=torch.float32), tmp_path)
    model, tokens = hub.load(tmp_path), random_batch(1, 9)[0]
    padded, mask = (torch.cat([torch.zeros_like(x[:, :4]), x], 1) for x in (tokens, torch.ones_like(tokens)))
    with torch.no_grad():
        found = model(padded, attention_mask=mask).logits[:, 4:]
        assert relative_to_max(found, model(tokens).logits) < 1e-5


def test_what_a_recurrent_state_cannot_do_is_refused(model):
    prompt = random_batch(1, 9)[0]
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(prompt, prompt_lookup_num_tokens=3, max_new_tokens=4)
    cache = model(prompt, use_cache=True).past_key_values
    assert (cache.is_croppable, cache.is_compileable, cache.get_seq_length()) == (False, False, 9)
    assert all(cache.is_linear)
    with pytest.raises(ValueError, match="cannot forget its last tokens"):
        cache.crop(-1)
    with pytest.raises(TypeError, match="past_key_values is a DynamicCache"):
        model(prompt, past_key_values=hub.transformers().DynamicCache())
    with pytest.raises(ValueError, match="one document a row"):
        model(prompt, cu_seq_lens_q=torch.tensor([0, 9]))


def test_training_may_follow_generation(folder):
    fresh = hub.load(folder)
    tokens, _ = random_batch(1, 9)
    with torch.inference_mode():
        fresh.generate(tokens, max_new_tokens=3)
    fresh(tokens, labels=tokens).loss.backward()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
def test_its_gradients_are_ours(folder, either, checkpointing):
    tokens, _ = random_batch(2, 70)
    ours = load_pretrained(folder)
    labels = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], dim=1)
    loss = ours.loss(tokens, labels)
    loss.backward()
    either.train()
    try:
        if checkpointing:
            either.activation_checkpointing_enable()
        found = either(tokens, labels=tokens)
        found.loss.backward()
        gradients = {name: parameter.grad for name, parameter in either.named_parameters()}
        assert found.loss.item() == pytest.approx(loss.item(), abs=1e-5)
        assert max(relative_errors(gradients, ours.named_logical_gradients()).values()) < 1e-4
    finally:
        either.activation_checkpointing_disable()
        either.zero_grad()
        either.eval()


def test_a_model_that_transformers_saved_is_read_back(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert not (tmp_path / "model.safetensors").exists()
    tokens, _ = random_batch(1, 20)
    with torch.no_grad():
        wanted = model(tokens).logits
        assert torch.equal(hub.load(tmp_path)(tokens).logits, wanted)
        assert relative_to_max(load_pretrained(tmp_path)(tokens).logits, wanted) < 1e-5


def test_new_weights_are_initialised_as_ours(model):
    fresh = type(model)(model.config)
    assert torch.equal(fresh.lm_head.weight, fresh.model.embed_tokens.weight)
    assert not fresh.model.embed_tokens.weight[TINY.pad_id].any()
    theta = dict(reference_model(TINY, 1, torch.float32).named_parameters())["model.layers.0.token_mixer.lrpe.theta"]
    assert torch.equal(fresh.model.layers[0].token_mixer.lrpe.theta, theta)
    assert fresh.model.layers[1].channel_mixer.l1.weight.std().item() == pytest.approx(LIVELY.init_std, rel=0.1)


def test_an_older_transformers_is_named(monkeypatch):
    older = types.ModuleType("transformers")
    older.__version__ = "4.57.1"
    monkeypatch.setitem(sys.modules, "transformers", older)
    with pytest.raises(ImportError, match=r"this model needs transformers 5; 4\.57\.1 is installed"):
        runpy.run_path(str(MODELLING["transnormer"]))
