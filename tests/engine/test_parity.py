"""Every layout equals one process: each gradient against fp64, and training itself against training."""

import dataclasses
import functools
from typing import Any, NamedTuple

import pytest
import torch

from megatron_tn.config import DataConfig, EngineConfig, OptimConfig, ParallelConfig
from megatron_tn.config.model import SOFTMAX_KINDS
from megatron_tn.engine.base import DTYPES
from megatron_tn.engine.build import build_engine, initialize_engine
from megatron_tn.optim.schedule import learning_rate
from megatron_tn.training.step import train_step
from tests.helpers.gradients import step_gradients
from tests.helpers.models import (
    COSFORMER,
    HYBRID,
    TINY,
    TRANSFORMER,
    TRANSNORMER_2022,
    Rows,
    random_batch,
    reference_gradients,
    relative_errors,
    tiny_config,
)
from tests.helpers.ranks import layout, run_shared, this_device
from tests.helpers.replicas import assert_replicas_equal, replicated

SEED, LENGTH, BATCH = 7, 23, 12  # context-parallel slices are uneven
LOCAL = EngineConfig(name="local", precision="fp32")
ZERO = [EngineConfig(name="deepspeed", zero_stage=stage, precision="fp32") for stage in range(4)]
ZERO_BF16 = [EngineConfig(name="deepspeed", zero_stage=stage, precision="bf16") for stage in range(4)]
FSDP2 = EngineConfig(name="fsdp2", precision="fp32")
# Nothing here is so large that ZeRO 3 would cut it up, unless it must.
ALL_PARTITIONED = dataclasses.replace(
    ZERO[3], deepspeed_config={"zero_optimization": {"stage3_param_persistence_threshold": 0}}
)
RECOMPUTED = dataclasses.replace(FSDP2, recompute="full")
RMSNORM = dataclasses.replace(TINY, norm="rmsnorm")
MODELS = {
    "simplermsnorm": dataclasses.replace(TINY, layers=3),  # a third layer gathers weights into what held the first's
    "rmsnorm": RMSNORM,
    "layernorm": dataclasses.replace(TINY, norm="layernorm", absolute_positions=True),
    "transformer": TRANSFORMER,
    "hybrid": HYBRID,
    "cosformer": COSFORMER,
    "transnormer_2022": TRANSNORMER_2022,
}


def name_of(engine: EngineConfig) -> str:
    name = f"zero{engine.zero_stage}" if engine.name == "deepspeed" else engine.name
    return f"{name} partitioned" if engine.deepspeed_config else name


class Case(NamedTuple):
    engine: str
    precision: str
    recompute: str
    accumulation: int
    model: str


def gradients_of(
    tp: int,
    cp: int,
    cases: list[tuple[EngineConfig, int, str]],
    sequence_parallel: bool = False,
    chunk_tokens: int | None = None,
) -> dict[Case, tuple[dict[str, torch.Tensor], float]]:
    """case -> (gradients, gradient norm), of one step of the same global batch."""
    context = layout(tp, cp, sequence_parallel)
    found = {}
    for engine_config, accumulation, model in cases:
        micro = BATCH // context.dp.size // accumulation
        config = tiny_config(
            model=MODELS[model],
            engine=engine_config,
            parallel=ParallelConfig(tp=tp, cp=cp, sequence_parallel=sequence_parallel),
            data=DataConfig(sequence_length=LENGTH, global_batch=BATCH, micro_batch=micro),
        )
        engine, gradients = step_gradients(config, context, SEED, chunk_tokens)
        settings = (engine_config.precision, engine_config.recompute)
        case = Case(name_of(engine_config), *settings, accumulation, model)
        found[case] = gradients, engine.step(1e-3).grad_norm
    assert len(found) == len(cases)
    return found


@functools.cache
def reference(model: str) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, float]]]:
    """Every gradient of one fp64 process; and by precision, the relative error of each by one process in it."""
    tokens, targets = random_batch(BATCH, LENGTH)
    _, exact = reference_gradients(MODELS[model], SEED, tokens, targets)
    errors = {}
    for precision, dtype in DTYPES.items():
        _, single = reference_gradients(MODELS[model], SEED, tokens, targets, dtype)
        errors[precision] = relative_errors(single, exact)
    return exact, errors


def check_gradients(
    world: int,
    tp: int,
    cases: list[tuple[EngineConfig, int, str]],
    device: str = "cpu",
    cp: int = 1,
    sequence_parallel: bool = False,
    chunk_tokens: int | None = None,
) -> None:
    """Gradients of each case, and their norm, against one fp64 process: within 1e-5, or twice the error of one process
    in the same precision where that is larger.

    chunk_tokens: products over tensor-parallel ranks are cut into chunks of as few.
    """
    ranks = run_shared(world, gradients_of, tp, cp, cases, sequence_parallel, chunk_tokens, device=device)
    for rank, found in enumerate(ranks):
        for case, (gradients, grad_norm) in found.items():
            exact, errors = reference(case.model)
            for parameter, error in relative_errors(gradients, exact).items():
                assert error <= max(1e-5, 2 * errors[case.precision][parameter]), (rank, case, parameter)
            total = torch.stack([value.norm() for value in exact.values()]).norm().item()
            assert grad_norm == pytest.approx(total, rel=1e-6 if case.precision == "fp32" else 1e-2), (rank, case)


# What tensor parallelism without data parallelism, or beside context parallelism, adds is no engine's own.
MEETING = [(LOCAL, 3, TINY.norm), (ZERO[1], 1, "rmsnorm"), (ZERO[3], 3, TINY.norm), (FSDP2, 1, "layernorm")]


@pytest.mark.parametrize(("world", "tp", "cp"), [(2, 1, 1), (4, 2, 1), (4, 1, 2)], ids=str)
def test_gradients_equal_one_fp64_process(world, tp, cp):
    engines = [LOCAL, *ZERO, FSDP2, *ZERO_BF16]
    covering = [(engine, 1 + 2 * (index % 2), TINY.norm) for index, engine in enumerate(engines)]
    cases = [*covering, (ZERO[1], 1, "rmsnorm"), (ZERO[2], 3, "rmsnorm"), (ZERO[3], 1, "layernorm")]
    cases.append((dataclasses.replace(ZERO[2], recompute="selective"), 3, "cosformer"))
    if cp == 1:
        cases += [(engine, 1, "transformer") for engine in (LOCAL, ZERO[3], FSDP2, ZERO_BF16[1])]
        cases += [(ALL_PARTITIONED, 1, "hybrid"), (dataclasses.replace(FSDP2, recompute="full"), 1, "transnormer_2022")]
    check_gradients(world, tp, cases, cp=cp)


def test_gradients_under_sequence_parallelism_equal_one_fp64_process():
    covering = [(engine, 1 + 2 * (index % 2), TINY.norm) for index, engine in enumerate([*ZERO, FSDP2, LOCAL])]
    cases = [*covering, (ZERO[1], 3, "rmsnorm"), (ZERO[2], 1, "layernorm"), (FSDP2, 3, "layernorm")]
    cases += [(engine, 1, "transformer") for engine in (LOCAL, ZERO[2], ALL_PARTITIONED, RECOMPUTED)]
    check_gradients(4, 2, cases, sequence_parallel=True)


@pytest.mark.parametrize(
    ("world", "tp", "cp", "sequence_parallel"),
    [(2, 2, 1, False), (2, 2, 1, True), (4, 4, 1, True), (4, 2, 2, False), (4, 2, 2, True)],
    ids=str,
)
def test_gradients_where_axes_meet_equal_one_fp64_process(world, tp, cp, sequence_parallel):
    cases = [*MEETING, (ZERO_BF16[2], 3, TINY.norm)]
    if cp == 1:
        cases += [(LOCAL, 1, "transformer"), (ALL_PARTITIONED, 1, "hybrid")]
    check_gradients(world, tp, cases, cp=cp, sequence_parallel=sequence_parallel)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole", "sequence_parallel"])
def test_weights_that_zero3_cuts_up_are_there_when_products_share_an_input(sequence_parallel):
    check_gradients(4, 2, [(ALL_PARTITIONED, 3, "rmsnorm")], sequence_parallel=sequence_parallel)


LAYOUTS = [
    (world, tp, cp) for world in (1, 2, 4) for tp in (1, 2, 4) for cp in (1, 2, 4) if world in (tp * cp, 2 * tp * cp)
]


@pytest.mark.full
@pytest.mark.parametrize(
    ("world", "tp", "cp", "sequence_parallel"),
    [(*layout, shared) for layout in LAYOUTS for shared in (False, True) if layout[1] > 1 or not shared],
    ids=str,
)
def test_gradients_equal_one_fp64_process_in_every_layout(world, tp, cp, sequence_parallel):
    engines = [LOCAL, *ZERO, *ZERO_BF16, ALL_PARTITIONED, FSDP2]
    models = [name for name, model in MODELS.items() if cp == 1 or not set(model.mixers) & set(SOFTMAX_KINDS)]
    cases = [(engine, n, model) for engine in engines for n in (1, 3) for model in models]
    check_gradients(world, tp, cases, cp=cp, sequence_parallel=sequence_parallel)


def train(
    tp: int,
    engine_config: EngineConfig,
    steps: int,
    model=RMSNORM,
    sequence_parallel: bool = False,
    cp: int = 1,
    rows: int = 1,
) -> dict[str, Any]:
    """Losses, gradient norms and, after the last step, this rank's parameters. rows: of a microbatch."""
    context = layout(tp, cp, sequence_parallel)
    config = tiny_config(
        model=model,
        engine=engine_config,
        parallel=ParallelConfig(tp=tp, cp=cp, sequence_parallel=sequence_parallel),
        data=DataConfig(sequence_length=LENGTH, global_batch=4, micro_batch=rows),
        optim=OptimConfig(lr=1e-2, clip_norm=0.5),
    )
    engine = build_engine(config, context, this_device())
    initialize_engine(engine, SEED)
    share = 4 // context.dp.size
    reports = []
    for step in range(steps):
        tokens, targets = random_batch(4, LENGTH, seed=step % 4)
        mine = range(context.dp.rank * share, (context.dp.rank + 1) * share, rows)
        batches = [Rows(tokens[i : i + rows], targets[i : i + rows]) for i in mine]
        lr = learning_rate(step, config.optim, config.schedule)
        reports.append(train_step(engine, batches, lr, this_device()))
    owned = {(r.name, r.start): r.values["param"].clone().cpu() for r in engine.owned_ranges()}
    whole = {name: p.detach().clone().cpu() for name, p in engine.model.named_parameters()}
    return {
        "losses": [r.loss for r in reports],
        "norms": [r.grad_norm for r in reports],
        "whole": whole,
        "owned": owned,
    }


def train_each(tp: int, engines: list[EngineConfig], *options: Any) -> dict[str, dict[str, Any]]:
    """`train` by each engine, one after the other in this world."""
    return {name_of(engine): train(tp, engine, *options) for engine in engines}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """Twenty steps of one process."""
    found = train(1, LOCAL, 20)
    assert found["losses"][-1] < found["losses"][0] - 0.1
    return found


@pytest.mark.parametrize(
    ("engines", "sequence_parallel"),
    [([LOCAL, *ZERO, FSDP2], False), ([ZERO[1]], True)],
    ids=["whole", "sequence_parallel"],
)
def test_twenty_steps_of_training_equal_one_process(alone, engines, sequence_parallel):
    one_microbatch = 2  # rows
    ranks = run_shared(4, train_each, 2, engines, 20, RMSNORM, sequence_parallel, 1, one_microbatch)
    for of_engines in ranks:
        for name, found in of_engines.items():
            assert found["losses"] == pytest.approx(alone["losses"], rel=2e-4), name
            assert found["norms"] == pytest.approx(alone["norms"], rel=2e-3), name
    for name in ranks[0]:
        assert_replicas_equal([replicated(of_engines[name]) for of_engines in ranks], 2, RMSNORM.layers)


def test_bf16_trains_with_fp32_masters():
    """Updates far below a bf16 step must add up in the masters."""
    one_microbatch = 2  # rows
    for found in run_shared(2, train_each, 1, ZERO_BF16, 8, TINY, False, 1, one_microbatch)[0].values():
        assert found["losses"][-1] < found["losses"][0]
        masters = torch.cat(list(found["owned"].values()))
        assert masters.dtype == torch.float32
        assert not torch.equal(masters, masters.bfloat16().float())


@pytest.mark.parametrize("elements", [1, 3000], ids=["a bucket each", "several"])
def test_zero1_in_bf16_trains_as_the_local_engine_does(elements):
    """Sums of bf16 gradients are reduced, in buckets, to the rank that updates them, and its parameters gathered."""
    ours = EngineConfig(name="deepspeed", zero_stage=1, precision="bf16", reduce_bucket_elements=elements)
    theirs = EngineConfig(name="local", precision="bf16", reduce_bucket_elements=50_000_000 // elements)
    found, wanted = (run_shared(4, train, 2, engine, 4, RMSNORM, True) for engine in (ours, theirs))
    for one, other in zip(found, wanted, strict=True):
        assert one["losses"] == pytest.approx(other["losses"], rel=1e-6)
        assert one["norms"] == pytest.approx(other["norms"], rel=1e-6)
        for (name, start), part in one["owned"].items():
            torch.testing.assert_close(part, other["owned"][name, 0][start : start + len(part)], rtol=1e-5, atol=1e-7)
        for name, parameter in one["whole"].items():
            torch.testing.assert_close(parameter, other["whole"][name], rtol=1e-2, atol=0)
    for name, parameter in found[0]["whole"].items():  # ranks 0 and 2 are data-parallel ones
        assert torch.equal(parameter, found[2]["whole"][name])
    assert sum(len(part) for rank in found for part in rank["owned"].values()) == sum(
        len(part) for rank in wanted[:2] for part in rank["owned"].values()
    )
