"""Every row of the paper's tables, as its file of conf/experiment/paper says it, equals its definition in fp64."""

import dataclasses
import inspect

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import StepSizes, self_check
from megatron_tn.cli.overrides import CONF
from megatron_tn.config import ConfigError, DataConfig, ModelConfig, ParallelConfig
from megatron_tn.convert import main as convert
from megatron_tn.evaluation.perplexity import document_nats
from megatron_tn.inference.generator import generate
from megatron_tn.inference.sampler import Sampler
from megatron_tn.model.base import Model
from megatron_tn.model.check import attentions, unused
from megatron_tn.model.init import initialize
from megatron_tn.model.registry import build_model, parameter_count
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.released.write import save_pretrained
from tests.helpers.checkpoints import load_model
from tests.helpers.definition import definition_gradients
from tests.helpers.models import (
    COSFORMER,
    HYBRID,
    TINY,
    TRANSFORMER,
    TRANSNORMER_2022,
    random_batch,
    relative_errors,
    tiny_config,
)
from tests.helpers.ranks import layout, run_shared
from tests.helpers.training import call
from tests.model.test_registry import CPU, saved, trained

TABLES = sorted((CONF / "experiment/paper").glob("*/*.yaml"))
ROWS = {f"{path.parent.name}/{path.stem}": OmegaConf.load(path).get("model") for path in TABLES}
# The rows of architecture are the models below, those of size have no variant of their own, and released rows are TINY.
VARIANTS = {name: OmegaConf.to_container(row) for name, row in ROWS.items() if row and not name.startswith("size")}
CONFIGS = {name: dataclasses.replace(TINY, **change) for name, change in VARIANTS.items()} | {
    "layernorm, no gate": dataclasses.replace(TINY, norm="layernorm", gate=False, lrpe="all"),
    "rmsnorm and others": dataclasses.replace(TINY, norm="rmsnorm", act="1+elu", glu_act="silu", lrpe="all"),
    "hybrid": HYBRID,
    "hybrid, softmax first": dataclasses.replace(HYBRID, attention=["softmax", "linear"], norm="rmsnorm"),
    "cosformer": COSFORMER,
    "transnormer_2022": TRANSNORMER_2022,
    "transnormer_2022, layernorm": dataclasses.replace(TRANSNORMER_2022, norm="layernorm", lrpe="none"),
}
LENGTH = 21  # over two ranks, the slices of tokens are uneven


def model_of(config: ModelConfig, context: ParallelContext | None) -> Model:
    """In fp64, with norm weights and biases that differ from their initial ones and zeros."""
    model = build_model(config, context, "cpu", torch.float64)
    initialize(model, 5)
    for name, parameter in model.named_parameters():
        if ".norm." in name or "_norm." in name:
            spec, axis = parameter.shard_spec, model.context.tp
            whole = torch.linspace(-0.3, 0.7, spec.shape[0], dtype=torch.float64) + name.endswith("weight")
            parameter.data.copy_(spec.take(whole, axis.rank, axis.size))
    return model


def gradients_of(config: ModelConfig, context: ParallelContext | None = None):
    """Loss, whole weights and whole gradients of one batch."""
    model = model_of(config, context)
    loss = model.loss(*random_batch(3, LENGTH, config))
    loss.backward()
    weights = {name: p.shard_spec.gather(p.detach(), model.context.tp) for name, p in model.named_parameters()}
    tokens, _ = random_batch(2, LENGTH)
    with torch.no_grad():
        logits = model(tokens).logits
    return loss.detach(), weights, model.named_logical_gradients(), logits, decoded(model, tokens)


def decoded(model: Model, tokens: Tensor) -> Tensor:
    """Logits by prefill, one token at a time, and a last piece."""
    parts, state = [], None
    with torch.no_grad():
        for piece in tokens.split([11, 1, 1, tokens.shape[1] - 13], dim=1):
            out = model(piece, state=state, return_state=True)
            parts, state = [*parts, out.logits], out.state
    return torch.cat(parts, dim=1)


def check(config: ModelConfig, found) -> None:
    loss, weights, gradients, logits, by_state = found
    torch.testing.assert_close(by_state, logits, rtol=1e-6, atol=1e-9)
    wanted, exact = definition_gradients(config, weights, *random_batch(3, LENGTH, config))
    torch.testing.assert_close(loss, wanted.to(loss.dtype), rtol=1e-6, atol=0)  # the loss is an fp32 sum
    for name, error in relative_errors(gradients, exact).items():
        assert error < 1e-9, name


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_variant_and_its_decoding_equal_their_definition(config):
    check(config, gradients_of(config))


def check_documents(model: Model, tokens: Tensor) -> Tensor:
    """The logits of three packed documents and an empty one. Another token in the second changes no other document."""
    bounds = torch.tensor([0, 6, 7, LENGTH, LENGTH], dtype=torch.int32, device=tokens.device)
    changed = tokens.clone()
    changed[0, 6] += 1
    with torch.no_grad():
        packed, again = (model(ids, cu_seqlens=bounds).logits for ids in (tokens, changed))
    assert torch.equal(again[:, :6], packed[:, :6])
    assert torch.equal(again[:, 7:], packed[:, 7:])
    assert not torch.equal(again[:, 6], packed[:, 6])
    return packed


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_on_a_gpu(config):
    """In fp32 against the definition, with decoding by every row alone and by rows together; documents in bf16."""
    exact = model_of(config, None)
    model = build_model(config, None, "cuda", torch.float32)
    model.load_state_dict(exact.state_dict())
    tokens, targets = (part.cuda() for part in random_batch(3, LENGTH, config))
    loss = model.loss(tokens, targets)
    loss.backward()
    wanted, gradients = definition_gradients(config, dict(exact.named_parameters()), tokens.cpu(), targets.cpu())
    torch.testing.assert_close(loss.cpu().double(), wanted, rtol=1e-5, atol=0)
    found = {name: gradient.cpu() for name, gradient in model.named_logical_gradients().items()}
    assert max(relative_errors(found, gradients).values()) < 1e-4
    with torch.no_grad():
        logits = model(tokens).logits
        assert (decoded(model, tokens) - logits).abs().max() < 1e-4 * logits.abs().max()
    prompts = [tokens[row, :length].tolist() for row, length in enumerate((3, 9, 12))]
    greedy = Sampler(temperature=0)
    alone = [generate(model, [prompt], max_new_tokens=8, sampler=greedy)[0] for prompt in prompts]
    assert generate(model, prompts, max_new_tokens=8, sampler=greedy) == alone
    check_documents(model.bfloat16(), tokens[:1])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_documents_do_not_leak(config):
    model = model_of(config, None)
    assert parameter_count(config) == sum(parameter.numel() for parameter in model.parameters())
    tokens, _ = random_batch(1, LENGTH)
    packed = check_documents(model, tokens)
    with torch.no_grad():
        alone = [model(part).logits for part in tokens.split([6, 1, LENGTH - 7], dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-11, atol=1e-12)


def gradients_on_ranks(configs: list[ModelConfig]):
    """Every second one under sequence parallelism."""
    contexts = [layout(2, sequence_parallel=shared) for shared in (False, True)]
    return [gradients_of(config, contexts[index % 2]) for index, config in enumerate(configs)]


def test_every_variant_on_two_ranks_equals_its_definition():
    configs = list(CONFIGS.values())
    for rank in run_shared(2, gradients_on_ranks, configs):
        for config, found in zip(configs, rank, strict=True):
            check(config, found)


class Operators(TorchDispatchMode):
    """names: of the operators of kernels/ that were called."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "megatron_tn":
            self.names.add(operator.__name__)
        return operator(*args, **(kwargs or {}))


def test_the_check_of_a_start_calls_every_operator_of_a_step(monkeypatch):
    monkeypatch.setattr(inspect.getmodule(self_check), "VOCABULARY", 512)
    norms = [CONFIGS[f"norm/{norm}"] for norm in ("rmsnorm", "layernorm")]
    for config in (TINY, *norms, HYBRID, COSFORMER, TRANSNORMER_2022, TRANSFORMER):
        model = model_of(config, None).float()
        with Operators() as step:
            model.loss(*random_batch(1, LENGTH, config)).backward()
        common = {"heads": 2, "glu_width": 8, "embed_width": 16, "length": 33, "dtype": torch.float32, "device": CPU}
        found = set()
        with Operators() as checked:
            for arguments in attentions(config):
                found |= self_check(StepSizes(**common, **arguments), unused=unused(config, "adamw")).keys()
        assert step.names <= checked.names, config
        assert not found & {"muon_", "gram_polynomial"}
        assert ("rms_norm" in found, "simple_rms_norm" in found) == (
            config.norm == "rmsnorm",
            config.norm == "simplermsnorm",
        )
    assert "add_scaled_simple_rms_norm" in unused(TRANSFORMER, "adamw")
    assert not {"muon_", "gram_polynomial"} & unused(TINY, "muon")


@pytest.mark.parametrize(("config", "kinds"), [(HYBRID, 2), (COSFORMER, 1), (TRANSNORMER_2022, 2), (TRANSFORMER, 1)])
def test_every_kind_of_attention_is_checked(config, kinds):
    assert len(list(attentions(config))) == kinds


TOO_LONG = "a sequence of 25 tokens is longer than model.max_length=24"


def test_a_sequence_longer_than_cosformer_is_refused_and_a_document_read_in_pieces():
    model = model_of(COSFORMER, None)
    tokens, _ = random_batch(1, 30)
    state = model(tokens[:, :24], return_state=True).state
    for given in ({"state": state}, {"cu_seqlens": torch.tensor([0, 25, 30], dtype=torch.int32)}):
        with pytest.raises(ValueError, match=TOO_LONG):
            model(tokens[:, :1] if "state" in given else tokens, **given)
    prompt, sampler = tokens[0, :20].tolist(), Sampler(temperature=0)
    with pytest.raises(ValueError, match="a prompt of 20 tokens and max_new_tokens=6 are longer than"):
        generate(model, [prompt], max_new_tokens=6, sampler=sampler)
    assert len(generate(model, [prompt], max_new_tokens=5, sampler=sampler)[0]) <= 5
    ids = tokens[0].numpy()
    (nats,), (again,) = (document_nats(model, [ids], window=window) for window in (7, 256))
    pieces = ((tokens[:, begin:end], tokens[:, begin + 1 : end + 1]) for begin, end in ((0, 24), (24, 29)))
    wanted = sum(model(ids, targets=targets, reduction="sum").loss.item() for ids, targets in pieces)
    assert (nats, again) == pytest.approx((wanted, wanted), rel=1e-5)


@pytest.mark.parametrize(
    ("model", "parallel", "said"),
    [
        (COSFORMER, {}, ["data.sequence_length=32 is longer than model.max_length=24"]),
        ({"attention": []}, {}, ["model.attention has 0 entries, but must have 1 to model.layers=2"]),
        ({"max_length": 50}, {}, ["model.max_length=50, but model.architecture=transnormer has model.max_length=0"]),
        (
            dataclasses.replace(COSFORMER, max_length=0, act="silu"),
            {},
            [
                "model.act=silu is a variant of TransNormerLLM: model.architecture=cosformer has model.act=relu",
                "model.max_length=0, but model.architecture=cosformer has model.max_length=at least 1: the length",
            ],
        ),
        (HYBRID, {"cp": 2}, ["parallel.cp=2 does not go with model.attention=[linear, softmax]: context parallelism"]),
        (TRANSNORMER_2022, {"cp": 2}, ["parallel.cp=2 does not go with model.architecture=transnormer_2022: context"]),
    ],
    ids=["long", "no pattern", "length", "cosformer", "hybrid cp", "transnormer_2022 cp"],
)
def test_what_a_variant_cannot_have_is_refused_by_name(model, parallel, said):
    model = dataclasses.replace(TINY, **model) if isinstance(model, dict) else model
    config = tiny_config(model=model, parallel=ParallelConfig(**parallel), data=DataConfig(sequence_length=32))
    found = config.problems()
    assert len(found) == len(said)
    for line, start in zip(found, said, strict=True):
        assert line.startswith(start)


@pytest.mark.parametrize("config", [HYBRID, COSFORMER, TRANSNORMER_2022], ids=lambda config: config.name)
def test_a_checkpoint_is_the_model_and_is_not_exported(tmp_path, config, capsys):
    settings = tiny_config(model=config)
    engine = trained(settings)
    checkpoint = saved(engine, settings, tmp_path)
    model, tokens = load_model(checkpoint), random_batch(2, 9)
    assert engine.model.loss(*tokens) == model.loss(*tokens)
    prompts = [[1, 5, 9], [1, *range(3, 14)]]
    found = generate(model, prompts, max_new_tokens=12, sampler=Sampler(temperature=0), together=2)
    with torch.no_grad():
        for ids, more in zip(prompts, found, strict=True):
            for chosen in more:
                assert int(model(torch.tensor([ids])).logits[0, -1].argmax()) == chosen
                ids.append(chosen)
    assert all(found)
    output = tmp_path / "export"
    assert call(convert, "export", f"checkpoint={checkpoint}", f"output={output}") == 2
    assert "cannot be exported" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="cannot be exported"):
        save_pretrained(model, output)
    assert not output.exists()
