"""The elementwise parts of Muon's update against the definition in fp64: plain, in the interpreter and on a GPU."""

import pytest
import torch

import kernels
from kernels.muon import reference
from tests.kernels.support import relative_error

ELEMENTS = 4 * 1024 + 37  # whole programs, and a part of one
SETTINGS = {"lr": 1e-2, "scale": 9.0, "weight_decay": 0.1}


def inputs(device: str) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(ELEMENTS, generator=draw).to(device) for _ in range(3)]


@pytest.fixture(params=["torch", "triton"])
def on(request, triton_device):
    """The device; operators run with the backend of the parameter."""
    with kernels.dispatch.backend(request.param):
        yield triton_device


def test_direction(on):
    momentum, gradient, _ = inputs(on)
    wanted = reference.direction(momentum.double(), gradient.double() / 3, beta=0.95)
    out, before = torch.full_like(momentum, float("nan"), dtype=torch.float16), gradient.clone()
    kernels.muon_direction_(out, momentum, gradient, beta=0.95, divisor=torch.tensor(3.0, device=on))
    assert torch.equal(gradient, before)
    assert relative_error(momentum, wanted[0]) < 1e-6
    assert relative_error(out, wanted[1]) < 1e-3


def test_apply(on):
    master, update, _ = inputs(on)
    update = update.half()
    wanted = reference.apply(master.double(), update.double(), **SETTINGS)
    copy = torch.full_like(update, float("nan"))
    kernels.muon_apply_(master, update, **SETTINGS, divisor=torch.tensor(3.0, device=on), copy=copy)
    assert relative_error(master, wanted) < 1e-6
    assert torch.equal(copy, master.half())


@pytest.mark.parametrize("divisor", [float("nan"), float("inf")])
def test_a_divisor_that_is_not_finite_changes_nothing(on, divisor):
    master, momentum, gradient = inputs(on)
    gradient[:5] = float("nan")
    before, scalar = [master.clone(), momentum.clone()], torch.tensor(divisor, device=on)
    out = torch.full_like(momentum, float("nan"))
    kernels.muon_direction_(out, momentum, gradient, beta=0.95, divisor=scalar)
    kernels.muon_apply_(master, out, **SETTINGS, divisor=scalar)
    assert torch.equal(master, before[0])
    assert torch.equal(momentum, before[1])
    assert torch.equal(out, momentum)


def test_what_does_not_fit_is_refused():
    x, one = torch.zeros(4), torch.ones(())
    with pytest.raises(ValueError, match=r"gradient.shape=\(3,\)"):
        kernels.muon_direction_(x, x, x[:3], beta=0.9, divisor=one)
    with pytest.raises(ValueError, match="must be one float32"):
        kernels.muon_apply_(x, x, **SETTINGS, divisor=one.double())
