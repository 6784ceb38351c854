"""Architectures are looked up by name, and nothing outside the registry knows which one it has."""

import dataclasses
import json
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch

from megatron_tn.checkpoint.load import load_checkpoint
from megatron_tn.config import ModelConfig, OptimConfig, TrainConfig, from_mapping, to_mapping
from megatron_tn.engine.base import Engine
from megatron_tn.engine.build import build_engine, initialize_engine
from megatron_tn.evaluation.perplexity import document_nats
from megatron_tn.inference.generator import generate
from megatron_tn.inference.sampler import Sampler
from megatron_tn.model.init import initialize
from megatron_tn.model.registry import ARCHITECTURES, build_model, parameter_count
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.training.preflight import checkpoint_problems
from megatron_tn.training.resume import Start
from megatron_tn.training.step import train_step
from tests.helpers.checkpoints import load_model, save_checkpoint
from tests.helpers.models import TINY, TRANSFORMER, Rows, random_batch, tiny_config

CPU = torch.device("cpu")


def test_every_name_that_the_config_allows_has_an_entry():
    assert set(get_args(get_type_hints(ModelConfig)["architecture"])) == ARCHITECTURES.keys()


def trained(config: TrainConfig) -> Engine:
    """An engine after one step."""
    engine = build_engine(config, ParallelContext(), CPU)
    initialize_engine(engine, 0)
    train_step(engine, [Rows(*random_batch(4, 24))], 1e-2, CPU)
    return engine


def saved(engine: Engine, config: TrainConfig, folder: Path) -> Path:
    return save_checkpoint(engine, folder, step=1, optimizer_step=1, config=to_mapping(config), training={"step": 1})


def test_another_architecture_trains_is_saved_evaluated_and_decodes(tmp_path):
    config = tiny_config(model=TRANSFORMER)
    engine = trained(config)
    assert parameter_count(TRANSFORMER) == sum(parameter.numel() for parameter in engine.model.parameters())
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
    assert checkpoint_problems(config, Start.at(checkpoint)) == []
    other = dataclasses.replace(config, model=dataclasses.replace(TINY, decay="paper"))
    assert checkpoint_problems(other, Start.at(checkpoint)) == [
        f"checkpoint {checkpoint} holds another model: model.decay='released', not 'paper'"
    ]
    other = dataclasses.replace(config, model=dataclasses.replace(TINY, lrpe=[True]))
    assert other.model.problems() == [line := f"model.lrpe has 1 entries but model.layers={TINY.layers}"]
    assert checkpoint_problems(other, Start.at(checkpoint)) == []  # that line is told
    manifest["config"]["model"]["lrpe"] = [True]
    (damaged := checkpoint.with_name("damaged")).mkdir()
    (damaged / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint_problems(config, Start.at(damaged)) == [f"checkpoint {damaged} holds another model: {line}"]
    muon = dataclasses.replace(config, optim=OptimConfig(name="muon"))
    (problem,) = checkpoint_problems(muon, Start.at(checkpoint))
    assert problem.startswith(f"optim.name=muon cannot go on from checkpoint {checkpoint}, whose moments are those of")


def test_a_model_is_built_without_a_layout():
    model = build_model(from_mapping(ModelConfig, to_mapping(TINY) | {"name": "without a size"}))
    initialize(model, 0)
    assert model.context == ParallelContext()
