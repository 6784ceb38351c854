"""Every row of the paper's tables, as its file of conf/experiment/paper says it, equals its definition in fp64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_tn.config import ModelConfig
from megatron_tn.model.base import Model
from megatron_tn.model.init import initialize
from megatron_tn.model.registry import build_model, parameter_count
from megatron_tn.parallel.context import ParallelContext
from tests.helpers.definition import definition_gradients
from tests.helpers.models import TINY, random_batch, relative_errors
from tests.helpers.ranks import run_ranks

VARIANTS = {
    "layernorm": {"norm": "layernorm"},
    "layernorm, no gate": {"norm": "layernorm", "gate": False, "lrpe": "all"},
    "rmsnorm": {"norm": "rmsnorm", "act": "1+elu", "lrpe": "all"},
    "absolute": {"absolute_positions": True, "lrpe": "none", "decay": "none", "glu_act": "silu"},
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
    return loss.detach(), weights, model.named_logical_gradients()


def check(config: ModelConfig, found) -> None:
    loss, weights, gradients = found
    wanted, exact = definition_gradients(config, weights, *random_batch(3, LENGTH, config))
    torch.testing.assert_close(loss, wanted.to(loss.dtype), rtol=1e-6, atol=0)  # the loss is an fp32 sum
    for name, error in relative_errors(gradients, exact).items():
        assert error < 1e-9, name


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_equals_its_definition(name):
    config = dataclasses.replace(TINY, **VARIANTS[name])
    check(config, gradients_of(config))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_state_carries_everything_and_documents_do_not_leak(name):
    config = dataclasses.replace(TINY, **VARIANTS[name])
    model = model_of(config, None)
    assert parameter_count(config) == sum(parameter.numel() for parameter in model.parameters())
    tokens, _ = random_batch(2, LENGTH)
    parts, state = [], None
    with torch.no_grad():
        for piece in tokens.split([11, 1, 1, LENGTH - 13], dim=1):
            out = model(piece, state=state, return_state=True)
            parts, state = [*parts, out.logits], out.state
        torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens).logits, rtol=1e-6, atol=1e-9)
        bounds = torch.tensor([0, 5, 6, LENGTH, LENGTH], dtype=torch.int32)
        alone = [model(part).logits for part in tokens[:1].split([5, 1, LENGTH - 6], dim=1)]
        packed = model(tokens[:1], cu_seqlens=bounds).logits
        torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-11, atol=1e-12)


def gradients_on_ranks(configs: list[ModelConfig]):
    contexts = [ParallelContext.create(2, sequence_parallel=shared) for shared in (False, True)]
    return [gradients_of(config, context) for config in configs for context in contexts]


def test_every_variant_on_two_ranks_equals_its_definition():
    configs = [dataclasses.replace(TINY, **change) for change in VARIANTS.values()]
    for rank in run_ranks(2, gradients_on_ranks, configs):
        for index, found in enumerate(rank):
            check(configs[index // 2], found)
