"""Which rank updates which matrix, in what rounds, and how few launches that takes."""

import contextlib
import dataclasses
import math
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tn.config import ConfigError
from megatron_tn.engine import matrices
from megatron_tn.engine.build import build_engine, initialize_engine
from megatron_tn.engine.update import Update
from megatron_tn.optim import muon
from megatron_tn.optim.build import build_optimizer
from megatron_tn.optim.groups import is_block_matrix
from megatron_tn.optim.muon import flops
from megatron_tn.parallel.context import Axis, ParallelContext
from megatron_tn.parallel.sharding import ShardSpec
from tests.engine.test_parity import LOCAL, RMSNORM
from tests.helpers.models import random_batch, tiny_config
from tests.optim.test_muon import CPU, LR, MUON, SPECS, CutShards

LAUNCHED = ("muon_direction_", "muon_apply_", "newton_schulz")


def test_a_matrix_that_tensor_parallel_ranks_hold_twice_is_refused():
    with pytest.raises(ConfigError, match=r"optim\.name=muon has no update for w, of which parallel.tp=2 ranks hold"):
        matrices.matrices_of("w", ShardSpec((4, 4)), 2, heads_apart=False)


def test_work_is_shared_out_evenly_and_in_rounds_of_one_shape(monkeypatch):
    monkeypatch.setattr(matrices, "ROUND_ELEMENTS", 64)
    specs = {"wide": ShardSpec((4, 8), dim=0), "packed": ShardSpec((16, 4), dim=0, blocks=4)}
    named = [(f"{name}{layer}", spec) for layer in range(3) for name, spec in specs.items()]
    found = [m for name, spec in named for m in matrices.matrices_of(name, spec, 1, heads_apart=False)]
    shares = matrices.shared_out(found, 2)
    assert sorted(m[:2] for share in shares for m in share) == sorted(m[:2] for m in found)
    first, second = (sum(flops(m.shape) for m in share) for share in shares)
    assert abs(first - second) <= flops((4, 8))
    for share in shares:
        for batch in matrices.batches(share):
            assert len({m.shape for m in batch}) == 1
            assert len(batch) * math.prod(batch[0].shape) <= 64


def test_a_rank_s_work_is_the_same_whatever_the_ranks_hold():
    found = matrices.matrices_of("packed", ShardSpec((24, 6), dim=0, blocks=4, heads=3), 1, heads_apart=True)
    found += matrices.matrices_of("wide", ShardSpec((6, 9), dim=0), 1, heads_apart=True)
    held = {matrix: matrices.Held(*(12, 1) if index < 9 else (11, 2)) for index, matrix in enumerate(found)}
    shares, without = matrices.shared_out(found, 3, held), matrices.shared_out(found, 3)
    assert [[m.shape for m in share] for share in shares] == [[m.shape for m in share] for share in without]
    assert sorted(len(share) for share in shares) == [1, 6, 6]
    heads = [[m.top // 2 for m in share if m.name == "packed"] for share in shares]
    assert heads == [[], [0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    at_rest = [m.top // 2 for rank, share in enumerate(shares) for m in share if matrices.stays(m, held[m], rank)]
    assert at_rest == heads[1]  # 6 to 8 are held by another rank, of 9 to 11 an element is


class Calls(TorchDispatchMode):
    """Context manager. `number`: of calls of torch's operators."""

    def __enter__(self):
        self.number = 0
        return super().__enter__()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.number += 1
        return operator(*args, **(kwargs or {}))


def test_a_step_launches_once_for_each_parameter_however_many_heads_it_has():
    """With the layers and heads of 385M."""
    model = dataclasses.replace(RMSNORM, layers=24, heads=8, embed_dim=16, glu_dim=44)
    calls = {}
    for apart in (False, True):
        optim = dataclasses.replace(MUON, heads_apart=apart)
        engine = build_engine(tiny_config(model=model, engine=LOCAL, optim=optim), ParallelContext(), CPU)
        initialize_engine(engine, seed=3)
        parameters = [
            name for name, spec in engine.model.shard_specs().items() if is_block_matrix(name, len(spec.shape))
        ]
        assert len(parameters) == 24 * 5
        engine.forward_backward(*random_batch(1, 8, model), None, scale=torch.ones(()), last=True)
        wraps = {name: mock.patch.object(muon, name, wraps=getattr(muon, name)) for name in LAUNCHED}
        with contextlib.ExitStack() as stack:
            launches = {name: stack.enter_context(wrap) for name, wrap in wraps.items()}
            calls[apart] = stack.enter_context(Calls())
            engine.step(LR)
        rounds = 4 if apart else 3  # a shape each
        wanted = (len(parameters), len(parameters), rounds)
        assert tuple(launches[name].call_count for name in LAUNCHED) == wanted
    assert calls[True].number < calls[False].number + 100  # a round


def test_parameters_that_are_neighbours_in_a_master_take_one_launch():
    """ZeRO 1 and 2: the matrices of the packed projection and of the one after it have one shape."""
    shards = CutShards(ParallelContext(), "flat")
    update = Update(build_optimizer(shards.groups, MUON, torch.float32), shards, SPECS, Axis(), clip_norm=0)
    spans = [span for each in update.optimizer.rounds for span in each.spans]
    assert sorted((span.start, span.stop) for span in spans) == [(0, 180), (180, 234), (234, 288)]
