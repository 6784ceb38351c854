"""Calls out of order are refused by every engine, and leave the sums as they are."""

import dataclasses

import pytest
import torch

from megatron_tn.config import EngineConfig
from megatron_tn.engine.base import Engine
from megatron_tn.engine.build import build_engine, initialize_engine
from tests.engine.test_nonfinite import BF16, ENGINES
from tests.helpers.models import random_batch, tiny_config
from tests.helpers.ranks import layout, run_shared, this_device

GRAPHS = [dataclasses.replace(engine, cuda_graph=True) for engine in (EngineConfig(name="local"), BF16[1])]


def add(engine: Engine, last: bool) -> None:
    tokens, targets = random_batch(2, 24)
    engine.forward_backward(tokens, targets, None, scale=torch.tensor(0.02), last=last)


def steps(engine_config: EngineConfig, misused: bool) -> list[float]:
    """Gradient norms of two steps of two microbatches; with `misused`, every call out of order between them."""
    engine = build_engine(tiny_config(engine=engine_config), layout(), this_device())
    initialize_engine(engine, 3)
    norms = []
    for _ in range(2):
        for sums, last in (("empty", False), ("adding", True)):
            if misused:
                with pytest.raises(RuntimeError, match=f"step was called while the gradient sums are '{sums}'"):
                    engine.step(1e-2)
            add(engine, last)
        if misused:
            for again in (False, True):
                with pytest.raises(RuntimeError, match=r"after the step's last microbatch .* call step first"):
                    add(engine, again)
        norms.append(engine.step(1e-2).grad_norm)
    return norms


def steps_of_each(engines: list[EngineConfig]) -> list[tuple[list[float], list[float]]]:
    return [(steps(engine, misused=False), steps(engine, misused=True)) for engine in engines]


def test_calls_out_of_order_are_refused_and_change_nothing():
    engines = [*ENGINES, *GRAPHS]
    for found in run_shared(2, steps_of_each, engines):
        for engine, (wanted, after_refusals) in zip(engines, found, strict=True):
            assert after_refusals == wanted, engine
            assert wanted[0] != wanted[1], engine
