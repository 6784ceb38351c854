"""Clipping within the update: what torch's own clipping before it gives."""

import pytest
import torch
from torch import nn

from megatron_tn.optim.clipping import clip_gradients

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
    "plain": lambda held: torch.optim.SGD(held, lr=0.1),
}


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
        clip_gradients(ours, 13 * factor, limit)
        ours.step()
        torch.testing.assert_close(found, clipped, rtol=1e-6, atol=0)
    moments = [
        [state["exp_avg"] for state in optimizer.state.values() if "exp_avg" in state] for optimizer in (ours, theirs)
    ]
    torch.testing.assert_close(*moments, rtol=1e-6, atol=0)
