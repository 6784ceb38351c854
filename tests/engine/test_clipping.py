"""Clipping within the update: what torch's own before it gives, and no update where the norm is not finite."""

import pytest
import torch
from torch import nn

from megatron_tn.engine.clipping import clipped_step
from megatron_tn.optim.adamw import FusedAdamW

GRADIENTS = [torch.tensor([3.0, -4.0]), torch.tensor([[12.0]])]  # of norm 13


def parameters():
    return [nn.Parameter(torch.ones_like(gradient)) for gradient in GRADIENTS]


def update(optimizer, factor):
    """A step with the gradients times `factor`."""
    held = optimizer.param_groups[0]["params"]
    for parameter, gradient in zip(held, GRADIENTS, strict=True):
        parameter.grad = gradient * factor
    return held


# Plain gradient descent shows the gradients' size, which Adam's first step hides; it has no kernel that divides.
OPTIMIZERS = {
    "adamw": lambda held: torch.optim.AdamW(held, lr=0.1, fused=True),
    "ours": lambda held: FusedAdamW(held, lr=0.1),
    "plain": lambda held: torch.optim.SGD(held, lr=0.1),
}


def moments(optimizer):
    return [state["exp_avg"].clone() for state in optimizer.state.values() if "exp_avg" in state]


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("limit", [0.0, 1.0, 20.0])
def test_steps_are_those_of_gradients_clipped_before(make, limit):
    ours, theirs = make(parameters()), make(parameters())
    for factor in (1.0, 0.05, 4.0):  # a step that is clipped leaves the next one's gradients alone
        clipped = update(theirs, factor)
        if limit:
            torch.nn.utils.clip_grad_norm_(clipped, limit)
        theirs.step()
        found = update(ours, factor)
        assert clipped_step(ours, torch.tensor(13 * factor), limit) == pytest.approx(13 * factor)
        torch.testing.assert_close(found, clipped, rtol=1e-6, atol=0)
    torch.testing.assert_close(moments(ours), moments(theirs), rtol=1e-6, atol=0)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("norm", [float("inf"), float("nan")])
@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_a_norm_that_is_not_finite_changes_nothing(make, norm, limit):
    ours, theirs = make(parameters()), make(parameters())
    for optimizer in (ours, theirs):
        update(optimizer, 0.05)
        clipped_step(optimizer, torch.tensor(0.65), limit)
    found = update(ours, norm)
    before = [parameter.clone() for parameter in found], moments(ours)
    assert not clipped_step(ours, torch.tensor(norm), limit) < float("inf")
    torch.testing.assert_close((list(map(torch.clone, found)), moments(ours)), before, rtol=0, atol=0)
    # Nor does it count as a step.
    for optimizer in (ours, theirs):
        held = update(optimizer, 0.05)
        clipped_step(optimizer, torch.tensor(0.65), limit)
    torch.testing.assert_close(found, held, rtol=0, atol=0)
