"""A step of 512 ranks on tensors without storage: collectives agree, and planted differences are found."""

import dataclasses
from collections import Counter

import pytest
import torch
import torch.distributed as dist

from megatron_tn.config import (
    DataConfig,
    EngineConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
    from_mapping,
)
from megatron_tn.engine.build import build_engine, initialize_engine
from megatron_tn.model.registry import parameter_count
from megatron_tn.parallel import collectives, products
from megatron_tn.plan import main
from megatron_tn.planning.collectives import CollectiveLog
from megatron_tn.planning.dry_run import dry_run, meeting_ranks
from megatron_tn.planning.microbatch import microbatch
from megatron_tn.planning.traffic import engine_exchanges, step_traffic
from tests.helpers.models import TINY, random_batch, tiny_config
from tests.helpers.ranks import layout as every_rank
from tests.helpers.ranks import run_shared
from tests.helpers.sizes import SIZES, compose_model
from tests.helpers.training import call

WORLD = 512
LAYOUTS = {
    "tp 8, ZeRO 1": (8, 1, EngineConfig(zero_stage=1)),
    "tp 8, ZeRO 3": (8, 1, EngineConfig(zero_stage=3)),
    "tp 8, cp 4, ZeRO 1": (8, 4, EngineConfig(zero_stage=1)),
    "FSDP2": (1, 1, EngineConfig(name="fsdp2")),
    "tp 8, local": (8, 1, EngineConfig(name="local")),
}


def layout(model: str, name: str, layers: int = 0) -> TrainConfig:
    tp, cp, engine = LAYOUTS[name]
    tp = 4 if model == "3b" and tp == 8 else tp  # twenty heads
    config = from_mapping(ModelConfig, compose_model(model))
    return dataclasses.replace(
        TrainConfig(),
        model=config.shortened(layers) if layers else config,
        parallel=ParallelConfig(tp=tp, cp=cp, sequence_parallel=tp > 1),
        engine=engine,
        data=DataConfig(sequence_length=2048, micro_batch=1, global_batch=WORLD // (tp * cp)),
    )


def check(config: TrainConfig) -> None:
    logs, problems = dry_run(config, WORLD)
    assert problems == []
    assert list(logs) == meeting_ranks(config, WORLD)
    if config.parallel.tp > 1:  # as many bytes as planning's table of the operators' collectives has
        planned = {kind: size for (kind, axis), (_, size) in microbatch(config).exchanged.items() if axis == "tp"}
        recorded = Counter()
        for each in logs[WORLD - 1]:
            last, neighbours = each.ranks[-1], len(each.ranks) == config.parallel.tp  # cp may have as many ranks
            recorded[each.kind] += each.size * (neighbours and last - each.ranks[0] == len(each.ranks) - 1)
        assert {kind: recorded[kind] for kind in ("all-gather", "reduce-scatter")} == {
            kind: planned[kind] for kind in ("all-gather", "reduce-scatter")
        }


@pytest.mark.parametrize(
    ("model", "name"),
    # FSDP2 makes 512 views of every parameter; of 175B's in test_ranks_that_meet_agree_at_full_depth.
    [("1b", name) for name in LAYOUTS] + [("175b", name) for name in LAYOUTS if "ZeRO" in name],
)
def test_ranks_that_meet_agree(model, name):
    check(layout(model, name, layers=2))


def test_ranks_with_fp8_products_agree():
    """Gathers of bytes, and of the largest element."""
    parallel = ParallelConfig(tp=2, sequence_parallel=True)
    data = DataConfig(sequence_length=24, micro_batch=1, global_batch=WORLD // 2)
    check(tiny_config(engine=EngineConfig(name="local", products="fp8"), parallel=parallel, data=data))


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in LAYOUTS if "local" not in name])
@pytest.mark.parametrize("model", SIZES)
def test_ranks_that_meet_agree_at_full_depth(model, name):
    check(layout(model, name))


def _another_shape(x, group, **options):
    rows = 2 * group.size() if dist.get_rank() else group.size()
    return SCATTER(x.new_empty(rows, *x.shape[1:]), group)


def _another_type(x, group, **options):
    return SCATTER(x.float() if dist.get_rank() else x, group)


def _another_group(x, group, **options):
    return SCATTER(x, dist.group.WORLD if dist.get_rank() == WORLD - 1 else group)


def _another_split(x, group, out=None):
    part = x.new_empty(x.shape[0] // group.size() + (dist.get_rank() == 7), *x.shape[1:])
    return part, dist.reduce_scatter_tensor(part, x, group=group, async_op=True)


def _another_order(x, group, **options):
    if dist.get_rank() == WORLD - 1:  # tensor parallel before data parallel
        dist.all_reduce(x.new_zeros(1), group=group)
        dist.all_reduce(x.new_zeros(1))
    else:
        dist.all_reduce(x.new_zeros(1))
        dist.all_reduce(x.new_zeros(1), group=group)
    return SCATTER(x, group)


SCATTER = products.start_reduce_scatter


@pytest.mark.parametrize("broken", [_another_shape, _another_type, _another_group, _another_split, _another_order])
def test_a_difference_between_ranks_is_found(broken, monkeypatch):
    monkeypatch.setattr(products, "start_reduce_scatter", lambda x, group, out=None: broken(x, group))
    config = tiny_config(parallel=ParallelConfig(tp=8, sequence_parallel=True), engine=EngineConfig(name="local"))
    _, problems = dry_run(config, WORLD)
    assert problems
    assert "rank" in problems[0]


def test_a_collective_that_one_rank_leaves_out_is_found(monkeypatch):
    reduce_ = collectives.all_reduce_
    left_out = lambda x, axis, *op: x if dist.get_rank() == WORLD - 1 else reduce_(x, axis, *op)  # noqa: E731
    monkeypatch.setattr("megatron_tn.gradients.norm.all_reduce_", left_out)
    config = tiny_config(parallel=ParallelConfig(tp=8), engine=EngineConfig(name="local"))
    _, problems = dry_run(config, WORLD)
    assert "none on 511" in problems[0]


def test_the_command_line_runs_it(capsys):
    words = (
        "model=1b",
        "model.layers=2",
        "parallel=tp8",
        "parallel.sequence_parallel=true",
        "engine=fsdp2",
        "nodes=64",
    )
    assert call(main, *words, "cluster=h100_80g", "dry_run=true") == 0
    assert "ranks 0, 7, 511 of 512 agree" in " ".join(capsys.readouterr().out.split())


# Weights above 10^5 elements, below which ZeRO 3 leaves a parameter whole on every rank.
WIDE = dataclasses.replace(TINY, vocab_size=401, embed_dim=384, glu_dim=768, layers=2)
FREED = {"zero_optimization": {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}}
ZERO = [
    EngineConfig(zero_stage=1),
    EngineConfig(zero_stage=2),
    EngineConfig(zero_stage=3),
    EngineConfig(zero_stage=3, deepspeed_config=FREED),
]


BATCH = DataConfig(sequence_length=32, micro_batch=1, global_batch=8)
MUON = [  # engine, tensor parallelism, heads apart
    (EngineConfig(zero_stage=1), 1, False),
    (EngineConfig(zero_stage=1), 2, True),
    (EngineConfig(zero_stage=2), 2, False),
    (EngineConfig(zero_stage=3), 1, True),
    (EngineConfig(name="fsdp2"), 1, False),
    (EngineConfig(name="fsdp2"), 2, True),
    (EngineConfig(name="local"), 2, True),
]


def recorded(configs: list[TrainConfig]) -> list[list[tuple[str, int]]]:
    """Kind and bytes of each engine's collectives in a step of two microbatches."""
    found = []
    for config in configs:
        engine = build_engine(config, every_rank(config.parallel.tp), torch.device("cpu"))
        initialize_engine(engine, 0)
        tokens, targets = random_batch(1, 32, config.model)
        for _ in range(2 if config.engine.zero_stage == 3 else 1):  # it gathers ahead by the first step's trace
            with CollectiveLog() as log:
                for last in (False, True):
                    engine.forward_backward(tokens, targets, None, scale=torch.tensor(1e-3), last=last)
                engine.step(1e-4)
        found.append([(each.kind, each.size) for each in log.calls])
    return found


def test_formulas_of_zero_are_what_four_processes_exchange():
    """gloo has no reduce-scatter without a copy: ZeRO 1 reduces each rank's part on its own there. ZeRO 3 that frees
    weights at once gathers the tied embedding once more than the formula has."""
    parameters = parameter_count(WIDE)
    configs = [tiny_config(engine=engine, model=WIDE, data=BATCH) for engine in ZERO]
    for ranks in run_shared(4, recorded, configs):
        for engine, calls in zip(ZERO, ranks, strict=True):
            sizes, planned = Counter(), Counter()
            for kind, size in calls:
                sizes[kind] += size
            for _, kind, width, times, _ in engine_exchanges(tiny_config(engine=engine, model=WIDE), 2):
                planned["reduce" if engine.zero_stage == 1 and kind == "reduce-scatter" else kind] += width * times
            for kind, bytes_an_element in planned.items():
                assert sizes[kind] / parameters == pytest.approx(bytes_an_element, rel=0.05), (engine, kind)
            assert sum(size for kind, size in sizes.items() if kind not in planned) < 100  # the gradient norm


def test_muons_exchange_is_what_four_processes_make_of_it():
    """In three layers, which ZeRO 1 does not cut between two matrices."""
    configs = [
        tiny_config(
            engine=engine,
            optim=OptimConfig(name="muon", heads_apart=heads_apart),
            parallel=ParallelConfig(tp=tp),
            model=dataclasses.replace(TINY, layers=3),
            data=BATCH,
        )
        for engine, tp, heads_apart in MUON
    ]
    for config, *ranks in zip(configs, *run_shared(4, recorded, configs), strict=True):
        planned = [each for each in step_traffic(config, 4, microbatch(config)) if each.kind == "all-to-all"]
        made = [[size for kind, size in calls if kind == "all-to-all"] for calls in ranks]
        assert {len(calls) for calls in made} == {sum(each.calls for each in planned)}
        copies = 2 if config.engine.name == "local" else 1
        for direction, each in enumerate(planned):  # a round brings matrices together, and sends updates back
            sizes = [sum(calls[direction::2]) for calls in made]
            assert sum(sizes) == copies * each.size > 0
            assert max(sizes) == each.nvlink
