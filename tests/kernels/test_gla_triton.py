"""The Triton kernels of gated linear attention, in the interpreter (fp32, fp16) or on a GPU, on outputs of NaN."""

import pytest
import torch

import kernels
from kernels.lightning import sequences, tiles
from tests.kernels.gla_support import Gated, check_noted
from tests.kernels.support import relative_error, strided

BOUNDS = (0, 5, 5, 37, 38, 103, 104, 104)


@pytest.mark.parametrize("with_lrpe", [False, True], ids=["plain", "lrpe"])
# Of one fp16 token theta's gradient is rounding alone.
@pytest.mark.parametrize(
    ("length", "dtype"),
    [
        *((1, torch.float32), (33, torch.float32), (65, torch.float16)),
        *(pytest.param(*case, marks=pytest.mark.full) for case in ((33, torch.float16), (65, torch.float32))),
    ],
    ids=str,
)
def test_any_length(triton_device, length, dtype, with_lrpe):
    Gated.random(
        length=length, batch=1, rates=(0.0, 0.5), dtype=dtype, with_lrpe=with_lrpe, begin=3, device=triton_device
    ).check()


@pytest.mark.parametrize("width", [8, 48, pytest.param(80, marks=pytest.mark.full), 128])
def test_any_width_with_lrpe(triton_device, width):
    Gated.random(length=35, batch=1, width=width, rates=(0.05,), device=triton_device).check()


@pytest.mark.parametrize("act", ["none", "1+elu", "relu"])
@pytest.mark.parametrize("with_lrpe", [False, True], ids=["plain", "lrpe"])
def test_every_activation(triton_device, act, with_lrpe):
    """At a width that is padded, where 1 + elu makes ones of zeros."""
    case = Gated.random(
        length=33, width=24, batch=1, rates=(0.1, 1.0), act=act, with_lrpe=with_lrpe, device=triton_device
    )
    case.check()


@pytest.mark.parametrize("act", ["silu", "none"])
def test_largest_elements_are_noted(triton_device, act):
    check_noted(triton_device, length=33, batch=1, rates=(0.1, 0.5), act=act, with_lrpe=act == "silu")


def test_without_a_gate(triton_device):
    Gated.random(length=33, batch=1, rates=(0.1,), gate=False, with_lrpe=False, device=triton_device).check()


@pytest.mark.parametrize("with_lrpe", [False, True], ids=["plain", "lrpe"])
def test_packed_documents(triton_device, with_lrpe):
    rates = (0.0, 1.0)
    Gated.random(length=104, rates=rates, bounds=BOUNDS, begin=7, with_lrpe=with_lrpe, device=triton_device).check()


def test_positions_left_out(triton_device):
    Gated.random(length=104, rates=(0.02,), bounds=BOUNDS, device=triton_device).check_without_positions()


def test_positions_for_each_row(triton_device):
    case = Gated.random(length=33, rates=(0.1,), device=triton_device)
    case.positions = torch.stack((case.positions, case.positions + 1_000))
    case.check()
    case.check_state_alone()


def test_positions_in_the_millions(triton_device):
    Gated.random(length=40, batch=1, rates=(0.0, 1.0), begin=3_000_000, device=triton_device).check()


def test_everything_beside_qkvu_has_strides(triton_device):
    case = Gated.random(length=104, rates=(0.02, 1.0), bounds=BOUNDS, begin=7, device=triton_device)
    for name in ("decay", "theta", "positions", "initial_state", "cu_seqlens", "dy", "dsquare_sum", "dstate"):
        setattr(case, name, strided(getattr(case, name)))
    case.check()


@pytest.fixture
def short_pieces(monkeypatch):
    """Segments of 64 positions and stretches as long, as only long sequences on a GPU would have."""
    monkeypatch.setattr(sequences, "plan_segment", lambda *, total, **others: min(64, total))
    monkeypatch.setattr(tiles, "THETA_STRETCH", 64)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.full)], ids=str)
@pytest.mark.parametrize("bounds", [None, (0, 70, 70, 71, 141, 144, 144)], ids=["rows", "packed"])
def test_segments_and_stretches(triton_device, short_pieces, bounds, dtype):
    rates = (0.0, 0.9)
    Gated.random(length=144, batch=1, rates=rates, bounds=bounds, dtype=dtype, device=triton_device).check()


@pytest.mark.parametrize("with_lrpe", [False, True], ids=["plain", "lrpe"])
@pytest.mark.parametrize("bounds", [None, (0, 70, 70, 71, 130, 133, 133)], ids=["rows", "packed"])
def test_a_slice_of_a_sequence(triton_device, short_pieces, bounds, with_lrpe):
    case = Gated.random(
        length=133, batch=1, rates=(0.0, 0.9), bounds=bounds, begin=5, with_lrpe=with_lrpe, device=triton_device
    )
    case.check_state_alone()
    case.check_exchange()


@pytest.mark.gpu
@pytest.mark.parametrize("with_lrpe", [False, True], ids=["plain", "lrpe"])
@pytest.mark.parametrize("width", [8, 16, 48, 64, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_on_the_gpu(cuda, width, dtype, with_lrpe):
    Gated.random(length=257, width=width, dtype=dtype, with_lrpe=with_lrpe, device=cuda).check()


@pytest.mark.gpu
@pytest.mark.parametrize("width", [192, 256])
def test_wide_heads_on_the_gpu(cuda, width):
    Gated.random(length=130, width=width, dtype=torch.bfloat16, with_lrpe=False, device=cuda).check()


@pytest.mark.gpu
@pytest.mark.parametrize("bounds", [None, (0, 5, 5, 70, 900, 901, 1300, 1300)], ids=["rows", "packed"])
def test_bf16_segments_on_the_gpu(cuda, short_pieces, bounds):
    case = Gated.random(length=1300, batch=1, width=64, bounds=bounds, begin=9, dtype=torch.bfloat16, device=cuda)
    case.check()


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float32, 1e-4)], ids=str)
def test_the_gradient_of_theta_at_length_on_the_gpu(cuda, dtype, bound):
    """At positions in the millions, against plain PyTorch in fp64 on the same device."""
    rates, length = (0.0, 0.004, 0.03, 0.3), 16385
    case = Gated.random(length=8, width=64, rates=rates, device=cuda)
    generator = torch.Generator(cuda).manual_seed(0)
    qkvu = torch.randn(1, length, 4 * 4 * 64, generator=generator, device=cuda).to(dtype)
    dy = torch.randn(1, length, 4 * 64, generator=generator, device=cuda).to(dtype)
    positions = torch.arange(length, device=cuda) + 1_000_000
    gradients = []
    for wide in (lambda x: x, torch.Tensor.double):
        theta = wide(case.theta).requires_grad_()
        y, _, _ = kernels.gla(wide(qkvu), case.decay, theta, act="silu", positions=positions)
        gradients += torch.autograd.grad(y, theta, wide(dy))
    assert relative_error(*gradients) <= bound


@pytest.mark.gpu
@pytest.mark.parametrize("with_lrpe", [False, True], ids=["plain", "lrpe"])
def test_two_runs_agree_bitwise_on_the_gpu(cuda, with_lrpe):
    case = Gated.random(length=1025, width=128, dtype=torch.bfloat16, with_lrpe=with_lrpe, device=cuda)
    assert all(torch.equal(a, b) for a, b in zip(case.run(), case.run(), strict=True))


@pytest.mark.gpu
def test_compiled_on_the_gpu(cuda):
    """The shapes that fake tensors promise are those that come: segments, features and all."""
    case = Gated.random(length=8, width=64, dtype=torch.bfloat16, device=cuda)
    qkvu = torch.randn(1, 16384, 4 * 3 * 64, device=cuda, dtype=torch.bfloat16, requires_grad=True)

    def mixer(x):
        return kernels.gla(x, case.decay, case.theta, act="silu")[0]

    eager = mixer(qkvu)
    compiled = torch.compile(mixer, fullgraph=True)(qkvu)
    assert torch.equal(eager, compiled)
    gradients = [torch.autograd.grad(y.float().square().sum(), qkvu)[0] for y in (eager, compiled)]
    assert torch.equal(*gradients)
