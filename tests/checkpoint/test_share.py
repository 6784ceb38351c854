"""One rank's share of 175B, of two layers: made without a whole parameter, and saved and read as it is."""

import dataclasses

import pytest
import torch

from megatron_tn.benchmarking.share import measure
from megatron_tn.config import EngineConfig, ModelConfig, ParallelConfig, TrainConfig, from_mapping
from megatron_tn.planning.concerns import checkpoint_bytes, rank_checkpoint_bytes
from tests.helpers.sizes import compose_model


def test_rank_0_of_512_writes_what_is_planned_and_reads_it_back(tmp_path):
    config = dataclasses.replace(
        TrainConfig(),
        model=from_mapping(ModelConfig, compose_model("175b")).shortened(2),
        parallel=ParallelConfig(tp=8, sequence_parallel=True),
        engine=EngineConfig(name="fsdp2"),
    )
    found = measure(config, 512, tmp_path / "checkpoints", torch.device("cpu"))  # raises where a value is another
    assert found.written == pytest.approx(rank_checkpoint_bytes(config, 512), rel=0.01)
    assert rank_checkpoint_bytes(config, 512) == checkpoint_bytes(config) / 512
    assert found.state < found.written < found.state + 20_000  # the header
    whole_parameter = 4 * config.model.embed_dim * config.model.glu_dim
    assert found.peak < found.state + whole_parameter / 20
    replicated = dataclasses.replace(config, engine=EngineConfig(name="local"))
    assert rank_checkpoint_bytes(replicated, 512) == checkpoint_bytes(config) / 8
