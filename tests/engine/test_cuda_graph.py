"""A microbatch's passes in one replayed CUDA graph: the same numbers, whatever is added up, and whoever looks on."""

import dataclasses
from typing import NamedTuple

import pytest
import torch

from megatron_tn.config import DataConfig, EngineConfig, ModelConfig, ParallelConfig
from megatron_tn.engine.build import build_engine, initialize_engine
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.training.diagnose import find_nonfinite
from megatron_tn.training.step import train_step
from tests.helpers.models import TINY, TRANSFORMER, Rows, random_batch, tiny_config
from tests.helpers.ranks import layout, run_shared, this_device

ENGINES = [
    EngineConfig(name="local", precision="bf16", reduce_bucket_elements=3000),  # several buckets
    EngineConfig(name="deepspeed", zero_stage=1, reduce_bucket_elements=3000),
]


class Case(NamedTuple):
    """packed: each microbatch is one row of several documents, else two rows."""

    engine: EngineConfig
    accumulation: int
    packed: bool
    model: ModelConfig = TINY


class Run(NamedTuple):
    """figures: losses and gradient norms of six steps. masters: fp32, after them."""

    figures: list[float]
    masters: list[torch.Tensor]


def trained(case: Case, context: ParallelContext) -> Run:
    """In one of the six steps a hook looks at gradients. Data-parallel ranks see the same batches."""
    length, accumulation, rows = 48, case.accumulation, 1 if case.packed else 2
    config = tiny_config(
        model=case.model,
        engine=case.engine,
        data=DataConfig(sequence_length=length, global_batch=2 * accumulation, micro_batch=rows),
        parallel=ParallelConfig(tp=context.tp.size, sequence_parallel=context.sequence_parallel),
    )
    engine = build_engine(config, context, this_device())
    initialize_engine(engine, 3)
    bounds = torch.tensor([0, 7, 20, length, length], dtype=torch.int32, device=this_device()) if case.packed else None
    figures = []
    for step in range(6):
        tokens, targets = (part.to(this_device()) for part in random_batch(2 * accumulation, length, seed=step))
        batches = [
            Rows(ids, wanted, bounds) for ids, wanted in zip(tokens.split(rows), targets.split(rows), strict=True)
        ]
        report = train_step(engine, batches, 1e-2, this_device())
        figures += [report.loss, report.grad_norm]
        if step == 3:
            assert find_nonfinite(engine, batches, this_device()) == []
    return Run(figures, [owned.values["param"].cpu().clone() for owned in engine.owned_ranges()])


def both_ways(tp: int, cases: list[Case]) -> list[tuple[Run, Run]]:
    """Each case kernel by kernel, and replayed."""
    context = layout(tp, sequence_parallel=tp > 1)
    replayed = [case._replace(engine=dataclasses.replace(case.engine, cuda_graph=True)) for case in cases]
    return [(trained(case, context), trained(other, context)) for case, other in zip(cases, replayed, strict=True)]


def check(pairs: list[tuple[Run, Run]], cases: list[Case]) -> None:
    for case, (wanted, found) in zip(cases, pairs, strict=True):
        assert found.figures == wanted.figures, case
        assert all(map(torch.equal, found.masters, wanted.masters)), case
        assert len(set(found.figures)) == len(found.figures), case  # every step had another batch


@pytest.mark.gpu
def test_replayed_passes_are_the_eager_ones():
    cases = [Case(engine, *way) for engine in ENGINES for way in ((1, False), (3, False), (1, True))]
    cases += [Case(ENGINES[1], 3, packed, TRANSFORMER) for packed in (False, True)]
    (pairs,) = run_shared(1, both_ways, 1, cases, device="cuda")
    check(pairs, cases)


@pytest.mark.parametrize("tp", [1, 2])
# A CPU has no graphs: there the setting changes nothing.
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu(2))])
def test_replayed_collectives_are_the_eager_ones(tp, device):
    cases = [Case(engine, 2, False) for engine in ENGINES]
    for pairs in run_shared(2, both_ways, tp, cases, device=device):
        check(pairs, cases)


def test_what_does_not_go_with_it_is_refused_by_name():
    def problems(**changes) -> str:
        return "\n".join(tiny_config(engine=EngineConfig(cuda_graph=True, **changes)).problems(1))

    assert problems() == ""
    assert "engine.cuda_graph=true goes with engine=local" in problems(zero_stage=2)
    assert "engine.gradient_dtype=bf16" in problems(gradient_dtype="bf16")
    assert "engine.compile=blocks is not none" in problems(name="local", compile="blocks")
