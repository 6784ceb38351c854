"""Gated linear attention in plain PyTorch against its fp64 definition, and its contract."""

import pytest
import torch

import kernels
from kernels.gla.features import add_query_features_
from tests.kernels.gla_support import Gated, check_noted
from tests.kernels.support import relative_error

BOUNDS = (0, 5, 5, 69, 70, 198, 200, 200)


@pytest.mark.parametrize("with_lrpe", [False, True], ids=["plain", "lrpe"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("length", [1, 2, 65, 129])
def test_any_length(length, dtype, with_lrpe):
    Gated.random(length=length, dtype=dtype, with_lrpe=with_lrpe, begin=3).check()


@pytest.mark.parametrize("act", ["none", "silu", "1+elu", "relu"])
@pytest.mark.parametrize("gate", [True, False], ids=["gated", "not gated"])
def test_every_activation(act, gate):
    Gated.random(act=act, gate=gate, length=40).check()


@pytest.mark.parametrize("gate", [True, False], ids=["gated", "not gated"])
def test_largest_elements_are_noted(gate):
    check_noted("cpu", gate=gate, length=40)


@pytest.mark.parametrize("with_lrpe", [False, True], ids=["plain", "lrpe"])
def test_packed_documents(with_lrpe):
    Gated.random(length=200, bounds=BOUNDS, with_lrpe=with_lrpe).check()


@pytest.mark.parametrize("bounds", [None, BOUNDS], ids=["rows", "packed"])
def test_positions_left_out(bounds):
    Gated.random(length=200, bounds=bounds).check_without_positions()


def test_room_for_features_is_left_alone_where_none_are_kept():
    """As on a GPU whose operators run in PyTorch."""
    case = Gated.random(length=9)
    features = torch.zeros(2, 9, 2, 3, 32)
    add_query_features_(features, qkvu=case.qkvu, theta=case.theta, act="silu", positions=case.positions)
    assert not features.any()


def test_positions_for_each_row():
    case = Gated.random(length=40)
    case.positions = torch.stack((case.positions, case.positions + 1_000))
    case.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    Gated.random(length=130, width=64, dtype=dtype).check()


def test_positions_in_the_millions():
    """Only distances matter to y and to theta's gradient; states turn with the positions."""
    case = Gated.random(length=70, begin=3_000_000)
    case.check()
    case.initial_state.zero_()
    case.dstate.zero_()
    near = Gated.random(length=70)
    near.initial_state.zero_()
    near.dstate.zero_()
    near.dsquare_sum = case.dsquare_sum
    for index in (0, 3, 5):
        assert relative_error(case.run()[index], near.run()[index]) < 1e-5


@pytest.mark.parametrize("with_lrpe", [False, True], ids=["plain", "lrpe"])
@pytest.mark.parametrize("bounds", [None, BOUNDS], ids=["rows", "packed"])
def test_a_slice_of_a_sequence(bounds, with_lrpe):
    case = Gated.random(length=200, bounds=bounds, with_lrpe=with_lrpe, begin=5)
    case.check_state_alone()
    case.check_exchange()


def test_views_and_results():
    """A strided qkvu, no state, and gradients from one result at a time."""
    case = Gated.random(length=20)
    wide = torch.zeros(2, 20, 2 * case.qkvu.shape[-1])
    wide[..., : case.qkvu.shape[-1]] = case.qkvu
    view = wide[..., : case.qkvu.shape[-1]].requires_grad_()
    y, square_sum, state = kernels.gla(view, case.decay, case.theta, act="silu")
    plain = case.qkvu.clone().requires_grad_()
    expected = kernels.gla(plain, case.decay, case.theta, act="silu")
    assert state is None
    assert torch.equal(y, expected[0])
    assert torch.equal(square_sum, expected[1])
    for index, result in enumerate((y, square_sum)):
        got = torch.autograd.grad(result.sum(), view, retain_graph=True)[0]
        assert torch.equal(got, torch.autograd.grad(expected[index].sum(), plain, retain_graph=True)[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkvu": torch.zeros(2, 70, 190)}, r"qkvu.shape\[2\]=190 must be 4 H d"),
        ({"decay": torch.zeros(0)}, r"qkvu.shape\[2\]=192 must be 4 H d with H from decay.shape=\(0,\)"),
        ({"qkvu": torch.zeros(70, 192)}, r"must be \[B, T, 4 H d\]"),
        ({"qkvu": torch.zeros(2, 0, 192)}, "length T=0 must be at least 1"),
        ({"act": "gelu"}, "act='gelu' is not one of the activations"),
        ({"theta": torch.zeros(3, 16)}, r"theta.shape=\(3, 16\) must be \[H, 1, d\] = \(3, 1, 16\)"),
        ({"theta": torch.zeros(3, 1, 16, device="meta")}, "theta.device=meta must be that of the other inputs, cpu"),
        ({"positions": torch.zeros(70)}, "positions.dtype=torch.float32"),
        ({"positions": torch.zeros(69, dtype=torch.int64)}, r"positions.shape=\(69,\) must be \[T\] = \(70,\)"),
        ({"positions": 2 * torch.arange(70)}, r"positions must rise by 1 .* after index \[0\]"),
        ({"initial_state": torch.zeros(2, 3, 16, 16)}, r"initial_state.shape=.* must be \(2, 3, 32, 16\)"),
        ({"cu_seqlens": torch.tensor([0, 70])}, "so B must be 1"),
    ],
    ids=lambda p: "+".join(p) if isinstance(p, dict) else "",
)
def test_refusals_name_the_argument(changes, message):
    case = Gated.random()
    arguments = {"qkvu": case.qkvu, "decay": case.decay, "theta": case.theta, "act": "silu"} | changes
    with pytest.raises(ValueError, match=message):
        kernels.gla(**arguments)
