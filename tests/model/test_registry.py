"""Architectures are looked up by name, and nothing outside the registry knows which one it has."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from megatron_tn.checkpoint.load import load_checkpoint, load_model
from megatron_tn.checkpoint.save import save_checkpoint
from megatron_tn.config import ModelConfig, TrainConfig, from_mapping, to_mapping
from megatron_tn.engine.base import Engine
from megatron_tn.engine.build import build_engine, initialize_engine
from megatron_tn.evaluation.perplexity import document_nats
from megatron_tn.inference.generator import generate
from megatron_tn.inference.sampler import Sampler
from megatron_tn.model.base import DecodingState, Model
from megatron_tn.model.init import initialize
from megatron_tn.model.layout import TokenLayout
from megatron_tn.model.registry import ARCHITECTURES, build_model, parameter_count, training_flops_per_token
from megatron_tn.parallel.context import Axis, ParallelContext
from megatron_tn.parallel.embedding import VocabParallelEmbedding, VocabParallelHead
from megatron_tn.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron_tn.training.preflight import checkpoint_problems
from megatron_tn.training.resume import Start
from megatron_tn.training.step import train_step
from tests.engine.test_parity import ALL_PARTITIONED, BATCH, FSDP2, LENGTH, LOCAL, SEED, ZERO, gradients_of
from tests.helpers.models import TINY, Rows, random_batch, reference_gradients, relative_errors, tiny_config
from tests.helpers.ranks import run_ranks

CPU = torch.device("cpu")


def test_every_name_that_the_config_allows_has_an_entry():
    assert set(get_args(get_type_hints(ModelConfig)["architecture"])) == ARCHITECTURES.keys()


class Attending(nn.Module):
    """x + W_o softmax(q k^T) v, causal and without positions. The state is k and v, [B, 2, H / tp, n, d]."""

    def __init__(self, config: ModelConfig, axis: Axis):
        super().__init__()
        self.heads = config.heads // axis.size
        self.qkv_proj = ColumnParallelLinear(config.embed_dim, 3 * config.embed_dim, axis, blocks=3)
        self.out_proj = RowParallelLinear(config.embed_dim, config.embed_dim, axis)

    def forward(self, x: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor | None]:
        qkv = self.qkv_proj(x, layout.token_slices).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        state = torch.stack([k, v], dim=1)
        if layout.state is not None:
            state = torch.cat([layout.state, state], dim=3)
        k, v = state.unbind(1)
        seen = layout.positions[:, None] >= torch.arange(k.shape[2])
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)
        return x + self.out_proj(y, layout.token_slices), state if layout.return_state else None


class AttendingModel(nn.Module):
    def __init__(self, config: ModelConfig, axis: Axis):
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.embed_dim, axis)
        self.layers = nn.ModuleList(Attending(config, axis) for _ in range(config.layers))

    def forward(self, tokens: Tensor, layout: TokenLayout, state: DecodingState | None = None):
        x, states = self.embed_tokens(tokens, layout.token_slices), []
        for layer, block in enumerate(self.layers):
            x, after = block(x, layout.continuing(state and state.layers[layer]))
            states.append(after)
        return x, states


def build(config: ModelConfig, context: ParallelContext) -> Model:
    body = AttendingModel(config, context.tp)
    return Model(config, context, body, VocabParallelHead(body.embed_tokens))


ANOTHER = dataclasses.replace(
    ARCHITECTURES["transnormer"],
    build=build,
    parameter_count=lambda config: config.embed_dim * (config.vocab_size + 4 * config.embed_dim * config.layers),
    forward_flops_per_token=lambda config, length: {"attention": 2 * config.layers * config.embed_dim * length},
)


@pytest.fixture
def another(monkeypatch) -> None:
    """TINY is a model of softmax attention."""
    monkeypatch.setitem(ARCHITECTURES, "transnormer", ANOTHER)


def trained(config: TrainConfig) -> Engine:
    """An engine after one step."""
    engine = build_engine(config, ParallelContext(), CPU)
    initialize_engine(engine, 0)
    train_step(engine, [Rows(*random_batch(4, 24))], 1e-2, CPU)
    return engine


def saved(engine: Engine, config: TrainConfig, folder: Path) -> Path:
    return save_checkpoint(engine, folder, step=1, optimizer_step=1, config=to_mapping(config), training={"step": 1})


@pytest.mark.usefixtures("another")
def test_another_architecture_trains_is_saved_evaluated_and_decodes(tmp_path):
    config = tiny_config()
    engine = trained(config)
    assert parameter_count(TINY) == sum(parameter.numel() for parameter in engine.model.parameters())
    assert training_flops_per_token(TINY, 8) == 2 * training_flops_per_token(TINY, 4)
    model = load_model(saved(engine, config, tmp_path))
    assert engine.model.loss(*random_batch(2, 9)) == model.loss(*random_batch(2, 9))

    documents = [np.array([1, *range(3, 3 + length), 2]) for length in (5, 40, 1)]
    whole, windows = (document_nats(model, documents, window=window) for window in (64, 7))
    assert windows == pytest.approx(whole, rel=1e-5)

    found = generate(model, [[1, 5, 9]], max_new_tokens=12, sampler=Sampler(temperature=0))[0]
    ids = [1, 5, 9]
    with torch.no_grad():
        while len(ids) < 3 + len(found):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert ids[3:] == found


ENGINES = [LOCAL, ZERO[1], ALL_PARTITIONED, dataclasses.replace(FSDP2, recompute="full")]


def gradients_on_ranks(tp: int, sequence_parallel: bool) -> list[dict[str, Tensor]]:
    ARCHITECTURES["transnormer"] = ANOTHER
    cases = [(engine, 1, TINY.norm) for engine in ENGINES]
    return [gradients for gradients, _ in gradients_of(tp, 1, cases, sequence_parallel).values()]


@pytest.mark.usefixtures("another")
def test_engines_and_layouts_take_another_architecture():
    _, wanted = reference_gradients(TINY, SEED, *random_batch(BATCH, LENGTH))
    for each_engine in run_ranks(4, gradients_on_ranks, 2, True):
        for gradients in each_engine:
            assert max(relative_errors(gradients, wanted).values()) < 1e-5


def test_a_checkpoint_older_than_the_registry_loads_and_resumes(tmp_path):
    config = tiny_config()
    engine = trained(config)
    checkpoint = saved(engine, config, tmp_path)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["config"]["model"]["architecture"]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    again = build_engine(config, ParallelContext(), CPU)
    load_checkpoint(again, checkpoint)
    tokens, targets = random_batch(2, 9)
    assert again.model.loss(tokens, targets) == load_model(checkpoint).loss(tokens, targets)
    assert checkpoint_problems(config, Start(checkpoint)) == []
    other = dataclasses.replace(config, model=dataclasses.replace(TINY, decay="paper"))
    assert checkpoint_problems(other, Start(checkpoint)) == [
        f"checkpoint {checkpoint} holds another model: decay: 'released' -> 'paper'"
    ]


def test_a_model_is_built_without_a_layout():
    model = build_model(from_mapping(ModelConfig, to_mapping(TINY) | {"name": "without a size"}))
    initialize(model, 0)
    assert model.context == ParallelContext()
