"""Products of a decoding step against their fp64 definition."""

import pytest
import torch

import kernels
from kernels.float8_linear.reference import dequantized, quantize_rows
from kernels.token import reference
from tests.kernels.support import TOLERANCE, assert_close

# Summed width K, outputs N.
CASES = {"even": (48, 40), "odd": (101, 33), "several tiles": (272, 50), "pieces of rows": (4500, 9)}
SIZES = pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
LARGE = pytest.mark.parametrize("sizes", [(2048, 8192), (5632, 2048), (11008, 300)], ids=str)


def draw(*shape, device, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def check(sizes, device="cpu", dtype=torch.float32, tolerance=None) -> None:
    width, outs = sizes
    x, residual = draw(width, device=device, dtype=dtype), draw(outs, device=device, dtype=dtype)
    weight, value = draw(outs, width, device=device, dtype=dtype), draw(outs, width, device=device, dtype=dtype).flip(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    parts = draw(5, device=device, dtype=wide).square()
    exact = [tensor.double() for tensor in (x, weight, value)]
    for options in ({}, {"eps": 1e-6}, {"eps": 1e-2, "square_sum": parts, "residual": residual}):
        got = kernels.token_linear(x, weight, **options)
        doubles = {name: o.double() if isinstance(o, torch.Tensor) else o for name, o in options.items()}
        wanted = reference.token_linear(*exact[:2], **doubles)
        assert_close("y", [got], [wanted], tolerance or TOLERANCE[dtype])
        assert got.dtype == dtype
    for act in ("none", "silu"):
        got = kernels.token_glu(x, weight, value, eps=1e-6, act=act)
        assert_close("y", [got], [reference.token_glu(*exact, eps=1e-6, act=act)], tolerance or TOLERANCE[dtype])


def check_fp8(sizes, device="cpu", dtype=torch.float32) -> None:
    """Weights in fp8 with a scale a row against the same weights in fp64."""
    width, outs = sizes
    x, residual = draw(width, device=device, dtype=dtype), draw(outs, device=device, dtype=dtype)
    (gate, gate_scale), (value, value_scale) = (quantize_rows(draw(outs, width, device=device, dtype=dtype))
                                                for _ in range(2))  # fmt: skip
    value_scale = value_scale * 2
    given, exact = {"eps": 1e-6, "residual": residual}, [dequantized(gate, gate_scale, torch.float64)]
    exact.append(dequantized(value, value_scale, torch.float64))
    got = kernels.token_linear(x, gate, weight_scale=gate_scale, **given)
    wanted = reference.token_linear(x.double(), exact[0], eps=1e-6, residual=residual.double())
    assert_close("y", [got], [wanted], TOLERANCE[dtype])
    got = kernels.token_glu(x, gate, value, gate_scale=gate_scale, value_scale=value_scale, eps=1e-6, act="silu")
    assert_close("y", [got], [reference.token_glu(x.double(), *exact, eps=1e-6, act="silu")], TOLERANCE[dtype])
    assert got.dtype == dtype


@SIZES
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_plain_pytorch(sizes, dtype):
    check(sizes, dtype=dtype)
    check_fp8(sizes, dtype=dtype)


@SIZES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_triton(triton_device, sizes, dtype):
    check(sizes, device=triton_device, dtype=dtype)
    check_fp8(sizes, device=triton_device, dtype=dtype)


@pytest.mark.gpu
@LARGE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_models_widths_on_the_gpu(cuda, sizes, dtype):
    check(sizes, device=cuda, dtype=dtype)
    check_fp8(sizes, device=cuda, dtype=dtype)


def test_they_are_the_blocks_own_products():
    """norm, product and gate of a block by its own operators give the same."""
    x, gate, value = (draw(*shape, device="cpu", dtype=torch.float64) for shape in ((8,), (6, 8), (6, 8)))
    normed = kernels.simple_rms_norm(x, 1e-6)
    got = kernels.token_glu(x, gate, value, eps=1e-6, act="silu")
    assert_close("y", [got], [kernels.sglu(gate @ normed, value @ normed, "silu")], 1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(4), torch.ones(3, 5)), r"weight is \[3, 5\] torch.float32; it must be \[N, 4\]"),
        ((torch.ones(4), torch.ones(4, 3).t()), "must be contiguous"),
        ((torch.ones(2, 4), torch.ones(3, 4)), r"must be \[K\]"),
        (
            (torch.ones(4), torch.ones(3, 4).to(torch.float8_e4m3fn)),
            r"float8_e4m3fn; it must be \[N, 4\] of torch.float32",
        ),
    ],
    ids=["width", "strides", "shape", "fp8 without a scale"],
)
def test_what_does_not_fit_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        kernels.token_linear(*arguments)


def test_wrong_options_are_named():
    x, weight = torch.ones(4), torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"square_sum of shape \[1\] must be \[P\], and needs eps, which is None"):
        kernels.token_linear(x, weight, square_sum=torch.ones(1))
    with pytest.raises(ValueError, match=r"a scale is \[1\] torch.float32; it must be \[3\] of torch.float32"):
        kernels.token_linear(x, weight.to(torch.float8_e4m3fn), weight_scale=torch.ones(1))
    with pytest.raises(ValueError, match=r"a scale of strides \(2,\) must be contiguous"):
        kernels.token_linear(x, weight.to(torch.float8_e4m3fn), weight_scale=torch.ones(6)[::2])
    with pytest.raises(ValueError, match=r"residual is \[4\]"):
        kernels.token_linear(x, weight, residual=x)
    with pytest.raises(ValueError, match="act='gelu' is not one of"):
        kernels.token_glu(x, weight, weight, eps=0.0, act="gelu")
