"""Weights in fp8 with a scale a row, and products of rows with them, against fp64."""

import pytest
import torch

from kernels.float8_linear import op, reference
from kernels.float8_linear.op import float8_linear, quantize_rows
from tests.kernels.support import TOLERANCE, assert_close, relative_error


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def check(rows, width, outs, device="cpu", dtype=torch.float32):
    x = draw(2, rows, width).to(device, dtype)
    data, scale = (part.to(device) for part in quantize_rows(draw(outs, width)))
    for part in (x[0, 0], x[0], x[:, : rows // 2], x, x[:, :0]):
        got = float8_linear(part, data, scale)
        wanted = part.double() @ reference.dequantized(data, scale, torch.float64).t()
        assert_close("y", [got], [wanted], TOLERANCE[dtype])
        assert (got.dtype, got.shape) == (dtype, wanted.shape)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_plain(dtype):
    check(7, 40, 24, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(5, 40, 24), (64, 600, 70)], ids=["a part", "parts of K, two tiles, a copy"])
def test_triton(triton_device, sizes, dtype):
    check(*sizes, triton_device, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [2, 8, 16, 60, 256, 1000])
@pytest.mark.parametrize("sizes", [(2048, 8192), (5632, 2048), (11008, 300)], ids=str)
def test_the_models_widths_on_the_gpu(cuda, rows, sizes):
    for dtype in (torch.bfloat16, torch.float32):
        check(rows, *sizes, cuda, dtype)


def test_a_rows_scale_is_the_smallest_power_of_two_that_holds_it():
    """Small and large rows keep the same relative precision; a row of zeros stays zero; bf16 holds the numbers."""
    weight = draw(6, 64) * torch.tensor([1e-30, 1e-3, 1.0, 1e4, 0.0, 1.0])[:, None]
    weight[5] *= 448 / weight[5].abs().amax()
    data, scale = quantize_rows(weight)
    most = data.float().abs().amax(1)
    assert most[4] == 0
    assert most[5] == 448
    assert ((most[:4] > 220) & (most[:4] <= 448)).all()
    assert torch.equal(torch.frexp(scale).mantissa, torch.full((6,), 0.5))
    exact = reference.dequantized(data, scale, torch.float64)
    for row in (0, 1, 2, 3, 5):
        assert relative_error(exact[row], weight[row]) < 0.03
    assert torch.equal(reference.dequantized(data, scale, torch.bfloat16).double(), exact)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_makes_its_output_nan(bad):
    weight = draw(3, 16)
    weight[1, 5] = bad
    y = float8_linear(draw(2, 16), *quantize_rows(weight))
    assert y.isfinite().all(0).tolist() == [True, False, True]


def test_what_does_not_fit_is_named():
    data, scale = quantize_rows(draw(3, 4))
    with pytest.raises(ValueError, match=r"data is \[3, 4\] torch.float8_e4m3fn; it must be \[N, 5\]"):
        float8_linear(torch.ones(2, 5), data, scale)
    with pytest.raises(ValueError, match=r"scale is \[2\] torch.float32; it must be \[3\] of torch.float32"):
        float8_linear(torch.ones(2, 4), data, scale[:2])
    with pytest.raises(ValueError, match=r"and \(0,\), must be contiguous"):
        float8_linear(torch.ones(2, 4), data, scale[:1].expand(3))


def test_an_older_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert op.obstacle(torch.device("cuda")) == (
        "the GPU's compute capability 8.6 is older than 8.9 (Ada), the first that converts e4m3"
    )
    assert op.obstacle(torch.device("cpu")) is None
