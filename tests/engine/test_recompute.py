"""Recomputation changes what is kept, never what comes out; a block compiles without a break at our operators."""

import contextlib
import dataclasses
import functools
from unittest import mock

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from megatron_tn.config import EngineConfig, ModelConfig, ParallelConfig
from megatron_tn.engine.build import build_engine, initialize_engine
from megatron_tn.model.block import Block
from megatron_tn.model.init import initialize
from megatron_tn.model.registry import build_model
from megatron_tn.parallel.recompute import recompute_blocks
from megatron_tn.planning.live import LiveMemory
from tests.engine.test_parity import ALL_PARTITIONED, FSDP2, LOCAL, ZERO
from tests.helpers.models import TINY, TRANSFORMER, random_batch, tiny_config
from tests.helpers.ranks import layout, run_shared, this_device

LRPE_EVERYWHERE = dataclasses.replace(TINY, lrpe="all")  # its compiled blocks share one graph


def backward(policy: str, every: int = 1, config: ModelConfig = LRPE_EVERYWHERE) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes that the forward pass leaves behind, and every gradient."""
    model = build_model(config, None, "cpu", torch.float32)
    initialize(model, 0)
    recompute_blocks(model.model.layers, policy, every)
    tokens, targets = random_batch(2, 64)
    with LiveMemory() as memory:
        for held in (tokens, targets, *model.parameters(), *model.buffers()):
            memory.add(held)
        before = memory.current
        loss = model.loss(tokens, targets)
        kept = memory.current - before
        loss.backward()
        del loss
        grown = memory.current - before
    left = grown - sum(parameter.grad.untyped_storage().nbytes() for parameter in model.parameters())
    assert left < 0.01 * kept  # the layers' rates, which are neither parameters nor buffers
    return kept, model.named_logical_gradients()


@pytest.mark.parametrize("policy", ["selective", "full"])
@pytest.mark.parametrize("config", [TINY, TRANSFORMER], ids=lambda config: config.name)
def test_gradients_are_those_of_no_recomputation(config, policy):
    _, wanted = backward("none", config=config)
    _, found = backward(policy, config=config)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert torch.equal(found[name], gradient), name


def test_each_policy_keeps_less():
    none, _ = backward("none")
    selective, _ = backward("selective")
    second, _ = backward("full", every=2)
    full, _ = backward("full")
    assert selective < 0.8 * none
    assert full < 0.5 * none
    assert full < selective
    assert full < second < none


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="policy='some' is not one of none, selective, full"):
        recompute_blocks([], "some")


def gradients(
    engine_config: EngineConfig, tp: int, cp: int = 1, sequence_parallel: bool = False
) -> dict[str, torch.Tensor]:
    torch._dynamo.reset()
    context = layout(tp, cp, sequence_parallel)
    parallel = ParallelConfig(tp=tp, cp=cp, sequence_parallel=sequence_parallel)
    config = tiny_config(model=LRPE_EVERYWHERE, engine=engine_config, parallel=parallel)
    engine = build_engine(config, context, this_device())
    initialize_engine(engine, 3)
    tokens, targets = (part.to(this_device()) for part in random_batch(2, 23, seed=context.dp.rank))
    engine.forward_backward(tokens, targets, None, scale=torch.tensor(0.01, device=this_device()), last=True)
    found = engine.named_logical_gradients()
    engine.step(1e-3)
    return found


def all_gradients(
    tp: int, cases: list[EngineConfig], cp: int = 1, sequence_parallel: bool = False
) -> list[dict[str, torch.Tensor]]:
    # On a CPU inductor needs a C++ compiler; what comes before it, where hooks and collectives count, does not.
    on_cpu = mock.patch.object(Block, "compile", functools.partialmethod(nn.Module.compile, backend="aot_eager"))
    with on_cpu if this_device().type == "cpu" else contextlib.nullcontext():
        return [gradients(case, tp, cp, sequence_parallel) for case in cases]


OVER_TWO = [(1, 1, False), (2, 1, False), (2, 1, True), (1, 2, False)]  # tp, cp, sequence parallel
ENGINES = (LOCAL, ZERO[1], ZERO[3], ALL_PARTITIONED, FSDP2)
POLICIES = (("none", 1), ("selective", 1), ("full", 1), ("full", 2))  # policy, every
ALL = [(engine, *policy, compiled) for compiled in ("none", "blocks") for engine in ENGINES for policy in POLICIES]
# Two policies an engine in each layout; all four in any two layouts that follow each other.
EAGER = [
    [(engine, *POLICIES[(place + first) % 4], "none") for place, engine in enumerate(ENGINES) for first in (at, at + 2)]
    for at in range(len(OVER_TWO))
]
# Engines that gather weights as a block runs: a compiled case takes seconds, and the full product has them all.
COMPILED = [(ZERO[3], "full", 2, "blocks"), (FSDP2, "selective", 1, "blocks")]


@pytest.mark.parametrize(
    ("tp", "cp", "sequence_parallel", "cases"),
    [
        *(pytest.param(*over, cases, id=f"{over}-eager") for over, cases in zip(OVER_TWO, EAGER, strict=True)),
        pytest.param(*OVER_TWO[0], COMPILED, id=f"{OVER_TWO[0]}-compiled"),
        *(pytest.param(*over, ALL, id=f"{over}-all", marks=pytest.mark.full) for over in OVER_TWO),
    ],
)
def test_every_engine_recomputes(tp, cp, sequence_parallel, cases):
    cases = [
        dataclasses.replace(engine, recompute=policy, recompute_every=every, compile=compiled)
        for engine, policy, every, compiled in cases
    ]
    for wanted, *found in run_shared(2, all_gradients, tp, [LOCAL, *cases], cp, sequence_parallel):
        for case, result in zip(cases, found, strict=True):
            for name, gradient in result.items():
                assert torch.allclose(gradient, wanted[name], rtol=0, atol=2e-6 * wanted[name].norm()), (case, name)


@pytest.mark.parametrize("policy", ["none", "full"])
@pytest.mark.parametrize(("config", "graphs"), [(TINY, 2), (TRANSFORMER, 1)], ids=["transnormer", "transformer"])
def test_a_block_is_one_graph(config, graphs, policy):
    model = build_model(config, None, "cpu", torch.float32)
    initialize(model, 0)
    tokens, targets = random_batch(2, 24)
    wanted = model.loss(tokens, targets)
    recompute_blocks(model.model.layers, policy)
    torch._dynamo.reset()
    compiled = CompileCounterWithBackend("aot_eager")
    for block in model.model.layers:
        block.compile(backend=compiled, fullgraph=True)
    loss = model.loss(tokens, targets)
    loss.backward()
    assert torch.allclose(loss, wanted, rtol=1e-6)
    # TransNormerLLM's first block has LRPE; all others share a graph, whatever their decay rates.
    assert compiled.frame_count == graphs


def compiled_gradients(
    tp: int, cp: int, sequence_parallel: bool, policies: tuple[str, ...]
) -> list[dict[str, torch.Tensor]]:
    """Eager, and of blocks compiled with each policy, which must not break at a collective."""
    context = layout(tp, cp, sequence_parallel)
    tokens, targets = random_batch(3, 7)
    found = []
    for compiled, policy in ((False, "none"), *((True, policy) for policy in policies)):
        model = build_model(LRPE_EVERYWHERE, context, "cpu", torch.float32)
        initialize(model, 0)
        recompute_blocks(model.model.layers, policy)
        if compiled:
            torch._dynamo.reset()
            for block in model.model.layers:
                block.compile(backend="aot_eager", fullgraph=True)
        model.loss(tokens, targets).backward()
        found.append(model.named_logical_gradients())
    return found


@pytest.mark.parametrize(
    ("over", "policies"),
    [
        ((2, 1, False), ("none", "full")),
        ((2, 1, True), ("selective", "full")),
        ((1, 2, False), ("none", "selective")),
        *(pytest.param(over, ("none", "selective", "full"), marks=pytest.mark.full) for over in OVER_TWO[1:]),
    ],
    ids=str,
)
def test_a_block_over_ranks_is_one_graph(over, policies):
    for eager, *compiled in run_shared(2, compiled_gradients, *over, policies):
        for found in compiled:
            for name, gradient in eager.items():
                assert torch.allclose(found[name], gradient, rtol=0, atol=2e-6 * gradient.norm()), name


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("engine", "policies"),
    [(LOCAL, ("none", "selective", "full")), (ZERO[1], ("none",)), (ZERO[3], ("full",)), (FSDP2, ("selective",))],
    ids=lambda value: value.name if isinstance(value, EngineConfig) else "-".join(value),
)
def test_compiled_or_recomputed_on_the_gpu(engine, policies):
    others = [dataclasses.replace(engine, compile="blocks", recompute=policy) for policy in policies]
    others.append(dataclasses.replace(engine, recompute="selective"))
    (wanted, *found) = run_shared(1, all_gradients, 1, [LOCAL, *others], device="cuda")[0]
    for result in found:
        for parameter, gradient in result.items():
            difference = (gradient - wanted[parameter]).norm() / wanted[parameter].norm()
            assert difference < 1e-4, parameter
