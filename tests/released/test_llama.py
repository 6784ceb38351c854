"""A Transformer's export is a LLaMA that transformers itself runs, and a LLaMA with a tied head is read back."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from megatron_tn import ParallelContext, load_pretrained
from megatron_tn.config import ConfigError
from megatron_tn.convert import main as convert
from megatron_tn.inference.generator import generate
from megatron_tn.inference.sampler import Sampler
from megatron_tn.model.registry import architecture
from megatron_tn.released.config import config_from_released, config_to_released
from megatron_tn.released.write import save_pretrained
from tests.helpers import hub
from tests.helpers.checkpoints import load_model
from tests.helpers.golden import relative_to_max
from tests.helpers.models import TRANSFORMER, random_batch, reference_model, relative_errors
from tests.helpers.ranks import run_ranks
from tests.helpers.training import call

# Initial values of this spread give a model whose next token depends on its prompt.
LIVELY = dataclasses.replace(TRANSFORMER, layers=3, init_std=0.3, rope_base=500.0)


@pytest.fixture(scope="module")
def ours():
    model = reference_model(LIVELY, seed=1, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    return model


@pytest.fixture(scope="module")
def folder(ours, tmp_path_factory):
    hub.transformers()
    folder = tmp_path_factory.mktemp("export")
    save_pretrained(ours, folder)
    return folder


@pytest.fixture(scope="module")
def theirs(folder):
    return hub.transformers().AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_transformers_computes_our_logits_and_gradients(ours, theirs):
    assert type(theirs).__name__ == "LlamaForCausalLM"
    tokens = random_batch(2, 70)[0].clamp(min=1)  # transformers' embedding has no gradient at its pad id, which is 0
    labels = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], dim=1)
    loss = ours.loss(tokens, labels)
    loss.backward()
    found = theirs(tokens, labels=tokens)
    found.loss.backward()
    with torch.no_grad():
        assert relative_to_max(found.logits, ours(tokens).logits) < 1e-5
    assert found.loss.item() == pytest.approx(loss.item(), abs=1e-5)
    wanted = ours.named_logical_gradients()
    released = architecture(LIVELY).released
    gradients = {name: theirs.get_parameter(released.tensor(name)).grad for name in wanted}
    assert max(relative_errors(gradients, wanted).values()) < 1e-4


def test_a_pad_that_is_eos_is_trained_by_transformers_too(tmp_path):
    config = dataclasses.replace(TRANSFORMER, pad_id=TRANSFORMER.eos_id)
    ours = reference_model(config, seed=1, dtype=torch.float32)
    save_pretrained(ours, tmp_path)
    theirs = hub.transformers().AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert theirs.generation_config.pad_token_id == config.eos_id
    tokens = torch.tensor([[1, 5, 2, 1, 7, 9, 2]])
    theirs(tokens, labels=tokens).loss.backward()
    ours.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    wanted = ours.model.embed_tokens.weight.grad
    assert (theirs.model.embed_tokens.weight.grad - wanted).norm() < 1e-4 * wanted.norm()
    assert load_pretrained(tmp_path).config == config


def test_greedy_generation_is_ours(ours, theirs):
    prompt = random_batch(1, 20, seed=6)[0]
    wanted = generate(ours, prompt.tolist(), max_new_tokens=24, sampler=Sampler(temperature=0))[0]
    found = theirs.generate(prompt, max_new_tokens=24, do_sample=False)[0, prompt.shape[1] :].tolist()
    assert len(set(wanted)) > 5
    assert (found[:-1] if found[-1] == LIVELY.eos_id else found) == wanted


def test_a_llama_that_transformers_saved_is_trained_on_and_exported_again(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    settings = tmp_path / "theirs" / "config.json"
    settings.write_text(
        settings.read_text().replace('"max_position_embeddings": 2048', '"max_position_embeddings": 96')
    )
    run, again = tmp_path / "run", tmp_path / "again"
    assert call(convert, "import", f"checkpoint={tmp_path / 'theirs'}", f"output={run}") == 0
    tokens, _ = random_batch(1, 20)
    model = load_model(run / "checkpoints" / "step_00000000")
    assert model.config == dataclasses.replace(LIVELY, name=model.config.name)
    with torch.no_grad():
        assert relative_to_max(model(tokens).logits, theirs(tokens).logits) < 1e-5
    assert call(convert, "export", f"checkpoint={run}", f"output={again}", "shard_mib=1") == 0
    wanted = {name: value for name, value in theirs.state_dict().items() if name != "lm_head.weight"}
    found = load_file(again / "model.safetensors")
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert not list(again.glob("*.py"))
    assert "trust_remote_code" not in (again / "README.md").read_text()
    assert call(convert, "export", f"checkpoint={again}", f"output={tmp_path / 'third'}") == 0
    for directory in (again, tmp_path / "third"):
        assert json.loads((directory / "config.json").read_text())["max_position_embeddings"] == 96


def save_at(tp: int, source, folder) -> bool:
    """Read an export at one layout, write it, and read it back."""
    context = ParallelContext.create(tp=tp)
    model = load_pretrained(source, context)
    save_pretrained(model, folder)
    torch.distributed.barrier()
    again = dict(load_pretrained(folder, context).named_parameters())
    return all(torch.equal(again[name], parameter) for name, parameter in model.named_parameters())


def test_tensor_parallel_ranks_read_and_write_one_export(folder, tmp_path):
    assert run_ranks(2, save_at, 2, folder, tmp_path) == [True, True]
    one, other = (load_file(place / "model.safetensors") for place in (folder, tmp_path))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], value) for name, value in other.items())


def test_config_json_says_all_of_the_model():
    assert config_from_released(config_to_released(LIVELY, 4096)) == LIVELY
    older = config_to_released(LIVELY)
    del older["rope_parameters"], older["head_dim"], older["num_key_value_heads"], older["megatron_tn"]
    assert config_from_released(older) == dataclasses.replace(LIVELY, name="released")
    assert config_from_released(older | {"pad_token_id": None, "rope_scaling": None}).pad_id == 0
    half_new = older | {"rope_parameters": {"rope_type": "default"}}
    assert config_from_released(half_new).rope_base == LIVELY.rope_base


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tie_word_embeddings": None}, "tie_word_embeddings=False, but this model has True"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2 differs from num_attention_heads=8"),
        ({"head_dim": 16}, "head_dim=16 is not hidden_size=64 / num_attention_heads=8"),
        ({"attention_bias": True}, "attention_bias=True, but this model has False"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu', but this model has 'silu'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope_type='llama3' is not default"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ({"rope_theta": 7.0}, "rope_theta=7.0 differs from rope_parameters.rope_theta="),
        ({"rope_parameters": [1]}, r"rope_parameters=\[1\] is not a mapping"),
        ({"intermediate_size": None}, "config.json has no intermediate_size"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers='many' is not a whole number"),
        ({"eos_token_id": [1, 2]}, r"config.json: eos_token_id=\[1, 2\] is not a whole number"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_llama_is_refused_by_name(change, message):
    values = config_to_released(TRANSFORMER) | change
    with pytest.raises(ConfigError, match=message):
        config_from_released({name: value for name, value in values.items() if value is not None})
