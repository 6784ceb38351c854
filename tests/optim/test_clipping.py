"""Clipping within the optimizer's step equals torch's clipping before it; a norm that is not finite changes nothing."""

import pytest
import torch
from torch import nn

from megatron_tn.gradients.clipping import clipping_divisor
from megatron_tn.optim.adamw import MOMENTS, ApexAdamW, TorchAdamW, TritonAdamW
from megatron_tn.optim.protocol import masters_of

GRADIENTS = [torch.tensor([3.0, -4.0]), torch.tensor([[12.0]])]  # of norm 13
LR = 0.1
KERNELS = [TorchAdamW, TritonAdamW, ApexAdamW]


@pytest.fixture(params=KERNELS, ids=lambda kernel: kernel.__name__)
def make(request, apex):
    # A large epsilon, with which an update shows the gradient's size, as AdamW's first one hides it otherwise.
    return lambda: request.param(
        [{"params": [nn.Parameter(torch.ones_like(gradient)) for gradient in GRADIENTS], "weight_decay": 0.01}],
        lr=LR,
        betas=(0.9, 0.95),
        eps=1.0,
    )


def give_gradients(optimizer, factor: float) -> list[nn.Parameter]:
    masters = masters_of(optimizer)
    for master, gradient in zip(masters, GRADIENTS, strict=True):
        master.grad = gradient * factor
    return masters


def step(optimizer, factor: float, limit: float, norm: float | None = None) -> list[nn.Parameter]:
    """With the gradients times `factor`, clipped to `limit`."""
    masters = give_gradients(optimizer, factor)
    norm = torch.tensor(13 * factor if norm is None else norm)
    optimizer.step(LR, clipping_divisor(norm, limit))
    if not norm.isfinite():
        optimizer.undo()
    return masters


def state(optimizer) -> list[torch.Tensor]:
    return [optimizer.state_of(master)[kind].clone() for master in masters_of(optimizer) for kind in MOMENTS]


@pytest.mark.parametrize("limit", [0.0, 1.0, 20.0])
def test_steps_are_those_of_gradients_clipped_before(make, limit):
    ours, theirs = make(), make()
    for factor in (1.0, 0.05, 4.0):  # a step that is clipped leaves the next one's gradients alone
        clipped = give_gradients(theirs, factor)
        if limit:
            torch.nn.utils.clip_grad_norm_(clipped, limit)
        theirs.step(LR, torch.ones(()))
        torch.testing.assert_close(step(ours, factor, limit), clipped, rtol=1e-6, atol=0)
    torch.testing.assert_close(state(ours), state(theirs), rtol=1e-6, atol=0)


@pytest.mark.parametrize("norm", [float("inf"), float("nan")])
@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_a_norm_that_is_not_finite_changes_nothing(make, norm, limit):
    ours, theirs = make(), make()
    for optimizer in (ours, theirs):
        step(optimizer, 0.05, limit)
    before = [master.clone() for master in masters_of(ours)], state(ours)
    found = step(ours, norm, limit, norm=norm)
    torch.testing.assert_close((list(map(torch.clone, found)), state(ours)), before, rtol=0, atol=0)
    # Nor does it count as a step.
    held = [step(optimizer, 0.05, limit) for optimizer in (ours, theirs)]
    torch.testing.assert_close(*held, rtol=0, atol=0)


def test_every_applied_step_leaves_the_masters_copies_behind(make):
    optimizer = make()
    optimizer.copies = {master: torch.zeros_like(master, dtype=torch.bfloat16) for master in masters_of(optimizer)}
    step(optimizer, 1.0, 1.0)
    for master, copy in optimizer.copies.items():
        assert torch.equal(copy, master.bfloat16())
