"""One update for every engine: what it refuses, and steps that must change nothing."""

import pytest
import torch
from torch import nn

from megatron_tn.engine.replicated import ReplicatedShards
from megatron_tn.engine.update import Update
from megatron_tn.optim.adamw import TorchAdamW, TritonAdamW
from megatron_tn.parallel.context import Axis
from megatron_tn.parallel.sharding import ShardSpec
from megatron_tn.precision.gradient_sum import GradientSum

SPECS = {"w": ShardSpec((2, 3)), "b": ShardSpec((4,))}


def updating(kernel: type = TritonAdamW, dtype: torch.dtype = torch.bfloat16) -> tuple[Update, list[nn.Parameter]]:
    """Over two parameters whose gradient sums are all ones."""
    parameters = {name: nn.Parameter(torch.ones(spec.shape, dtype=dtype)) for name, spec in SPECS.items()}
    for parameter in parameters.values():
        parameter.gradient_sum = GradientSum(torch.ones(parameter.shape))
    shards = ReplicatedShards(parameters)
    optimizer = kernel([{"params": shards.masters, "weight_decay": 0.1}], lr=0.1, betas=(0.9, 0.95), eps=1e-8)
    return Update(optimizer, shards, SPECS, Axis(), clip_norm=1.0), list(parameters.values())


@pytest.mark.parametrize("kernel", [TritonAdamW, TorchAdamW])
def test_a_step_without_target_tokens_changes_nothing(kernel):
    update, parameters = updating(kernel)
    assert update.step(0.1, torch.tensor(7)) == (pytest.approx(10**0.5), True)
    before = [owned.values[kind].clone() for owned in update.owned_ranges() for kind in owned.values]
    held = [parameter.clone() for parameter in parameters]
    found = update.step(0.1, torch.tensor(0))
    assert not found.applied
    after = [owned.values[kind] for owned in update.owned_ranges() for kind in owned.values]
    assert all(map(torch.equal, [*before, *held], [*after, *parameters]))
    # Nor is it counted: the next step is the second, as it is without the empty one between.
    update.step(0.1, torch.tensor(7))
    other, _ = updating(kernel)
    other.step(0.1)
    other.step(0.1)
    assert all(map(torch.equal, update.shards.masters, other.shards.masters))


def test_copies_follow_masters_that_were_written():
    update, parameters = updating()
    for owned in update.owned_ranges():
        owned.values["param"].fill_(3)
    update.refresh(optimizer_step=5)
    assert all((parameter == 3).all() for parameter in parameters)
