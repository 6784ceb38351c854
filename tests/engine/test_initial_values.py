"""Initial values depend on seed, name and place alone, and building an engine takes about what it keeps."""

import dataclasses
import itertools
import os

import pytest
import torch

from megatron_tn.config import EngineConfig, ModelConfig, ParallelConfig
from megatron_tn.engine.build import build_engine, initialize_engine
from megatron_tn.model.init import TILE, fill_initial, threads
from megatron_tn.model.registry import parameter_count
from megatron_tn.model.transnormer import initial_box
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.parallel.sharding import ShardSpec
from megatron_tn.planning.live import LiveMemory
from tests.helpers.models import TINY, tiny_config
from tests.helpers.ranks import run_ranks

NAME = "model.layers.1.token_mixer.qkvu_proj.weight"
SPECS = {
    "columns": ShardSpec((4 * 130, 300), dim=0, blocks=4),
    "rows": ShardSpec((300, 700), dim=1),
    "vocabulary": ShardSpec((601, 40), dim=0, padded=604),
    "uneven": ShardSpec((5, 7), dim=1),
}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_parts_are_parts_of_one_value(spec, size):
    whole = initial_box(NAME, spec.shape, tuple((0, n) for n in spec.shape), TINY, 3)
    for rank in range(size):
        wanted = spec.take(whole, rank, size).view(-1)
        cuts = [0, wanted.numel() // 3 + 1, wanted.numel() - 2, wanted.numel()]
        found = [torch.full((stop - start,), float("nan")) for start, stop in itertools.pairwise(cuts)]
        for part, start in zip(found, cuts, strict=False):
            fill_initial(part, NAME, spec, rank, size, start, TINY, 3)
        assert torch.equal(torch.cat(found), wanted)


def test_tiles_are_normal_and_independent():
    value = initial_box(NAME, (4 * TILE, 2 * TILE), ((0, 4 * TILE), (0, 2 * TILE)), TINY, 0)
    assert value.mean().abs() < 5 * TINY.init_std / value.numel() ** 0.5
    assert value.std().item() == pytest.approx(TINY.init_std, rel=0.01)
    tiles = value.unfold(0, TILE, TILE).unfold(1, TILE, TILE).reshape(8, -1)
    assert (torch.corrcoef(tiles) - torch.eye(8)).abs().max() < 0.03
    assert not torch.equal(value, initial_box(NAME, value.shape, ((0, 4 * TILE), (0, 2 * TILE)), TINY, 1))
    assert not torch.equal(value, initial_box("other", value.shape, ((0, 4 * TILE), (0, 2 * TILE)), TINY, 0))


def test_the_pad_row_is_zero():
    name = "model.embed_tokens.weight"
    config = dataclasses.replace(TINY, pad_id=2, eos_id=3)
    value = initial_box(name, (9, 4), ((1, 5), (0, 4)), config, 0)
    assert (value == 0).all(1).tolist() == [False, True, False, False]


def test_threads_are_a_processs_share_of_the_cores(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for bound, wanted in ((64, 8), (8, 8), (2, 2)):  # srun binds each task to its cores
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, bound=bound: set(range(bound)), raising=False)
        assert threads() == wanted
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS
    assert threads() == 8


# Large against TILE, so that what is drawn at a time does not count, in one layer as in the whole.
WIDE = ModelConfig(vocab_size=2048, embed_dim=768, layers=4, heads=8, glu_dim=2048)
ENGINES = {
    "zero3": EngineConfig(name="deepspeed", zero_stage=3, precision="fp32", reduce_bucket_elements=500_000),
    "fsdp2": EngineConfig(name="fsdp2", precision="fp32"),
    "local": EngineConfig(name="local", precision="fp32"),
}


def built(tp: int, engine: EngineConfig) -> tuple[int, int]:
    """Peak of building and of what is left, bytes."""
    context = ParallelContext.create(tp)
    config = tiny_config(model=WIDE, engine=engine, parallel=ParallelConfig(tp=tp))
    with LiveMemory() as memory:
        made = build_engine(config, context, torch.device("cpu"))
        initialize_engine(made, 0)
    return memory.peak, memory.current


@pytest.mark.parametrize(("name", "tp"), [("zero3", 1), ("fsdp2", 1), ("local", 4)])
def test_building_takes_what_a_rank_keeps(name, tp):
    largest = 4 * 4 * WIDE.embed_dim**2  # the projection q|k|v|u, whole, 7 % of the model
    whole = 4 * parameter_count(WIDE)
    for peak, left in run_ranks(4, built, tp, ENGINES[name]):
        # A quarter each of parameters, gradients, masters (ZeRO 3) and two moments.
        assert left < 1.3 * whole, f"{left / whole:.2f}"
        assert peak < left + 1.1 * largest, f"{peak / whole:.2f}, {left / whole:.2f} left"
