"""Predicted step times, beside every measured row of this package's models on one, two and four GPUs."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from megatron_tn.cli import CONF
from megatron_tn.config import (
    ClusterConfig,
    DataConfig,
    EngineConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
    from_mapping,
)
from megatron_tn.optim.muon import flops
from megatron_tn.planning.microbatch import extrapolated, microbatch
from megatron_tn.planning.muon import exchange, most_work
from megatron_tn.planning.speed import matrix_rate, step_time
from megatron_tn.planning.traffic import engine_exchanges, received, spans_of
from tests.helpers.models import TINY, tiny_config
from tests.helpers.sizes import compose_model

ROWS = Path(__file__).parents[2] / "docs" / "measurements"
CLUSTERS = {"NVIDIA H200": "h200_141g", "NVIDIA H100 80GB": "h100_80g"}
STEP, WITH_OPTIMIZER = "step", "step + optimizer"


def cluster(name: str) -> ClusterConfig:
    return from_mapping(ClusterConfig, OmegaConf.to_container(OmegaConf.load(CONF / "cluster" / f"{name}.yaml")))


def measured_rows() -> list[dict]:
    """Newest first, of each layout and part of the step the newest alone."""
    files = sorted(ROWS.glob("*.jsonl"), reverse=True)
    lines = [json.loads(line) for path in files for line in reversed(path.read_text().splitlines())]
    rows = [row for row in lines if row["name"] in (STEP, WITH_OPTIMIZER) and not row["model"].startswith("llama")]
    keys = ("model", "layout", "engine", "recompute", "replay", "gpu", "sequence_length", "micro_batch", "name")
    return list({tuple(row[key] for key in keys): row for row in reversed(rows)}.values())


def config_of(row: dict) -> TrainConfig:
    tp, cp = (int(re.search(rf"{axis} (\d+)", row["layout"])[1]) for axis in ("tp", "cp"))
    policy, *every = re.split(r", every | blocks", row["recompute"])
    stage = re.fullmatch(r"zero(\d)", row["engine"])
    engine = EngineConfig(
        name="deepspeed" if stage else row["engine"],
        zero_stage=int(stage[1]) if stage else 1,
        recompute=policy,
        recompute_every=int(every[0]) if every else 1,
        products="fp8" if "fp8 products" in row["layout"] else "bf16",
        cuda_graph=row["replay"] == "CUDA graph",
    )
    return dataclasses.replace(
        TrainConfig(),
        model=from_mapping(ModelConfig, compose_model(row["model"])),
        parallel=ParallelConfig(tp=tp, cp=cp, sequence_parallel="sequence parallel" in row["layout"]),
        engine=engine,
        optim=OptimConfig(
            name="muon" if "Muon" in row["layout"] else "adamw", heads_apart="heads apart" in row["layout"]
        ),
        cluster=cluster(CLUSTERS[row["gpu"]]),
        data=DataConfig(**{key: row[key] for key in ("sequence_length", "micro_batch", "global_batch")}),
    )


def test_step_times_are_within_a_tenth_of_every_measured_row():
    rows = measured_rows()
    assert len(rows) >= 25
    for row in rows:
        config = config_of(row)
        time = step_time(config, row["gpus"], extrapolated(config))
        predicted = 1e3 * (time.passes if row["name"] == STEP else time.total)
        said = f"{row['gpus']} x {row['gpu']}: {row['model']}, {row['layout']}, {row['engine']}, {row['name']}"
        print(
            f"{100 * (predicted / row['value'] - 1):+5.1f} %  {predicted:.1f} predicted, {row['value']:.1f} ms {said}"
        )
        assert predicted == pytest.approx(row["value"], rel=0.10), said


@pytest.mark.parametrize(("recompute", "every"), [("none", 1), ("selective", 1), ("full", 2), ("selective", 3)])
def test_a_few_layers_tell_of_all(recompute, every):
    config = tiny_config(
        model=dataclasses.replace(TINY, layers=9),
        parallel=ParallelConfig(tp=2, sequence_parallel=True),
        engine=EngineConfig(recompute=recompute, recompute_every=every),
    )
    whole, guess = microbatch(config), extrapolated(config)
    assert (guess.products, guess.moved, guess.exchanged) == (whole.products, whole.moved, whole.exchanged)
    assert guess.kept == pytest.approx(whole.kept, rel=1e-3)  # the allocator's blocks
    assert guess.peak >= whole.peak * 0.999


def test_bytes_over_nvlink_and_network_by_hand():
    assert received("all-gather", 800, 8, 1) == (700, 0)
    assert received("reduce-scatter", 6400, 1, 64) == (0, 6300)
    assert received("all-reduce", 6400, 8, 64) == (2 * 5600, 2 * 6300 / 8)  # the node receives 6300 at eight ports
    config = tiny_config(cluster=cluster("a100_80g"), parallel=ParallelConfig(tp=4, cp=4))
    assert [spans_of(config, 64, axis) for axis in ("tp", "cp", "data")] == [(4, 1), (2, 2), (2, 8)]


@pytest.mark.parametrize(
    ("engine", "bytes_an_element"),
    [
        (EngineConfig(name="local"), 2 * 4),
        (EngineConfig(zero_stage=1), 4 + 2),
        (EngineConfig(zero_stage=1, gradient_dtype="bf16"), 2 * 2 + 2),
        (EngineConfig(zero_stage=2), 3 * 2 * 4 + 2),
        (EngineConfig(zero_stage=3), 3 * (2 + 4)),
        (EngineConfig(name="fsdp2"), 3 * (2 + 2 + 4)),
        (EngineConfig(name="fsdp2", reshard_after_forward=False), 3 * (2 + 4)),
    ],
)
def test_an_engine_s_bytes_in_a_step_of_three_microbatches(engine, bytes_an_element):
    found = engine_exchanges(tiny_config(engine=engine), 3)
    assert sum((2 if kind == "all-reduce" else 1) * width * times for _, kind, width, times, _ in found) == (
        bytes_an_element
    )


def test_muon_adds_the_products_of_the_rank_with_most_matrices():
    model = from_mapping(ModelConfig, compose_model("7b"))
    data = DataConfig(sequence_length=2048, global_batch=1024, micro_batch=4)
    config = dataclasses.replace(TrainConfig(), model=model, cluster=cluster("h100_80g"), data=data)
    muon = dataclasses.replace(config, optim=OptimConfig(name="muon"))
    work = most_work(muon, 64)
    d, f = model.embed_dim, model.glu_dim
    square, wide = (flops((d, columns), torch.bfloat16) for columns in (d, f))
    assert set(work.products) == {d}
    assert work.products[d] in {squares * square + wides * wide for squares in range(6) for wides in range(4)}
    assert 0 <= work.products[d] - (150 * square + 90 * wide) / 64 <= wide
    time, plain = (step_time(one, 64, extrapolated(one)) for one in (muon, config))
    assert time.passes == plain.passes
    assert time.update > plain.update + work.products[d] / matrix_rate(config.cluster, d)


@pytest.mark.parametrize(
    ("engine", "tp", "world", "heads_apart", "in_heads", "in_others"),
    [
        (EngineConfig(name="local"), 2, 2, False, 1 / 2, 1 / 2),
        (EngineConfig(name="local"), 2, 2, True, 0, 1 / 2),  # a rank holds its heads whole
        (EngineConfig(zero_stage=1), 1, 4, False, 0, 0),  # and six of the 24 layers
        (EngineConfig(zero_stage=1), 1, 4, True, 0, 0),
        (EngineConfig(zero_stage=1), 2, 8, False, 1 / 2, 1 / 2),
        (EngineConfig(zero_stage=1), 2, 8, True, 0, 1 / 2),
        (EngineConfig(zero_stage=3), 1, 4, False, 0, 3 / 4),  # q, k, v or u of every layer
        (EngineConfig(zero_stage=3), 1, 8, False, 1 / 2, 7 / 8),
        (EngineConfig(name="fsdp2"), 1, 4, True, 0, 3 / 4),
    ],
)
def test_muons_matrices_stay_on_the_ranks_that_hold_them(engine, tp, world, heads_apart, in_heads, in_others):
    """in_heads, in_others: shares of the elements of q, k, v and u, and of the other matrices, that change ranks."""
    model = from_mapping(ModelConfig, compose_model("385m"))
    optim = OptimConfig(name="muon", heads_apart=heads_apart)
    config = tiny_config(model=model, engine=engine, parallel=ParallelConfig(tp=tp), optim=optim)
    d, f = model.embed_dim, model.glu_dim
    found = exchange(config, world, on_a_node=4)
    assert found.elements == model.layers * (in_heads * 4 * d * d + in_others * (d * d + 3 * d * f))
    assert (found.rounds == 0) == (found.elements == 0)
    for links in (found.gathered, found.scattered):
        assert found.elements / world <= sum(links) <= 1.1 * found.elements / world
        assert (links.network > 0) == (world > 4 and engine.zero_stage == 3)


def test_the_local_engine_has_no_zero_stage():
    config = tiny_config(cluster=cluster("h200_141g"))
    work = microbatch(config)
    other = dataclasses.replace(config, engine=dataclasses.replace(config.engine, zero_stage=3))
    assert step_time(other, 2, work) == step_time(config, 2, work)


def test_a_matrix_rate_between_two_that_are_known():
    rates = ClusterConfig(matrix_rates=[[512, 500.0], [1024, 600.0]])
    assert [matrix_rate(rates, size) / 1e12 for size in (256, 512, 768, 1024, 9999)] == [250, 500, 550, 600, 600]
