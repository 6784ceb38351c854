"""The Triton kernels of gated linear attention, in the interpreter (fp32, fp16) or on a GPU, on outputs of NaN."""

import pytest
import torch

from tests.kernels.gla_support import Gated

BOUNDS = (0, 5, 5, 37, 38, 103, 104, 104)


@pytest.mark.parametrize("with_lrpe", [False, True], ids=["plain", "lrpe"])
# Of one fp16 token theta's gradient is rounding alone.
@pytest.mark.parametrize(
    ("length", "dtype"),
    [(1, torch.float32), *((n, t) for n in (33, 65) for t in (torch.float32, torch.float16))],
    ids=str,
)
def test_any_length(triton_device, length, dtype, with_lrpe):
    Gated.random(
        length=length, batch=1, rates=(0.0, 0.5), dtype=dtype, with_lrpe=with_lrpe, begin=3, device=triton_device
    ).check()


@pytest.mark.parametrize("width", [8, 48, 80, 128])
def test_any_width_with_lrpe(triton_device, width):
    Gated.random(length=35, batch=1, width=width, rates=(0.05,), device=triton_device).check()


@pytest.mark.parametrize("act", ["none", "1+elu"])
@pytest.mark.parametrize("with_lrpe", [False, True], ids=["plain", "lrpe"])
def test_every_activation(triton_device, act, with_lrpe):
    """At a width that is padded, where 1 + elu makes ones of zeros."""
    case = Gated.random(
        length=33, width=24, batch=1, rates=(0.1, 1.0), act=act, with_lrpe=with_lrpe, device=triton_device
    )
    case.check()


def test_without_a_gate(triton_device):
    Gated.random(length=33, batch=1, rates=(0.1,), gate=False, with_lrpe=False, device=triton_device).check()


@pytest.mark.parametrize("with_lrpe", [False, True], ids=["plain", "lrpe"])
def test_packed_documents(triton_device, with_lrpe):
    Gated.random(length=104, bounds=BOUNDS, begin=7, with_lrpe=with_lrpe, device=triton_device).check()


def test_positions_in_the_millions(triton_device):
    Gated.random(length=40, batch=2, begin=3_000_000, device=triton_device).check()


@pytest.fixture
def short_pieces(monkeypatch):
    """Segments of 64 positions and stretches as long, as only long sequences on a GPU would have."""
    from kernels.lightning import launch, launch_gla

    monkeypatch.setattr(launch, "plan_segment", lambda capability, size, rows, total, *widths: min(64, total))
    for module in (launch, launch_gla):
        monkeypatch.setattr(module, "THETA_STRETCH", 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("bounds", [None, (0, 70, 70, 71, 200, 203, 203)], ids=["rows", "packed"])
def test_segments_and_stretches(triton_device, short_pieces, bounds, dtype):
    rates = (0.0, 0.02, 0.9)
    Gated.random(length=203, batch=1, rates=rates, bounds=bounds, dtype=dtype, device=triton_device).check()


@pytest.mark.parametrize("with_lrpe", [False, True], ids=["plain", "lrpe"])
@pytest.mark.parametrize("bounds", [None, (0, 70, 70, 71, 130, 133, 133)], ids=["rows", "packed"])
def test_the_state_alone(triton_device, short_pieces, bounds, with_lrpe):
    case = Gated.random(
        length=133, batch=1, rates=(0.0, 0.9), bounds=bounds, begin=5, with_lrpe=with_lrpe, device=triton_device
    )
    case.check_state_alone()
