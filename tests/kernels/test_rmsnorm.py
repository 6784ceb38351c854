"""RMSNorm with its weight against the fp64 definition, in PyTorch and in Triton."""

import pytest
import torch

import kernels
from kernels.rmsnorm import reference, triton_rmsnorm
from tests.kernels.support import TOLERANCE, assert_close, strided


def check(shape, dtype, device="cpu", lay_out=lambda x: x):
    """Alone, at a branch of the residual stream and after an addition: from the rounded sum on in fp64."""
    torch.manual_seed(0)
    x, r, ds, dy = (lay_out(torch.randn(shape, dtype=torch.float64).to(device, dtype)) for _ in range(4))
    weight = torch.randn(shape[-1], dtype=torch.float64).to(device, dtype).requires_grad_()
    x.requires_grad_(), r.requires_grad_()
    tolerance = max(TOLERANCE[dtype] / 10, 1e-12) if dtype.itemsize >= 4 else TOLERANCE[dtype]
    for s, y in (kernels.branch_rms_norm(x, weight), kernels.add_rms_norm(x, r, weight)):
        found = torch.autograd.grad((s, y), (x, weight), (ds, dy), retain_graph=True)
        alone = torch.autograd.grad(y, (x, weight), dy)
        exact, exact_weight = (z.detach().double().requires_grad_() for z in (s, weight))
        wanted = reference.rms_norm(exact, exact_weight)
        leaves = exact, exact_weight
        both = torch.autograd.grad((exact * 1, wanted), leaves, (ds.double(), dy.double()), retain_graph=True)
        expected = [wanted, *both, *torch.autograd.grad(wanted, leaves, dy.double())]
        assert (y.dtype, y.shape) == (dtype, x.shape)
        assert_close("y dx dweight dx_alone dweight_alone", [y, *found, *alone], expected, tolerance)
    assert torch.equal(s, x + r)


SHAPES = pytest.mark.parametrize("shape", [(7,), (3, 8), (2, 5, 257), (9, 2048)], ids=str)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@SHAPES
def test_torch(shape, dtype):
    check(shape, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@SHAPES
def test_triton(triton_device, monkeypatch, shape, dtype):
    monkeypatch.setattr(triton_rmsnorm, "PROGRAMS", 4)  # so that a program has several rows
    check(shape, dtype, triton_device)


def test_triton_takes_strided_rows(triton_device):
    check((2, 5, 80), torch.float32, triton_device, strided)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [1024, 2048, 4096, 12288])
def test_bf16_on_the_gpu(cuda, width):
    check((4099, width), torch.bfloat16, cuda)


X = torch.ones(2, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, X[0], X[0]), r"residual is \(6,\)"),
        ((X, X, X), r"weight is \(2, 6\) torch.float32; it must be \(6,\)"),
        ((X, X, X[0].double()), "torch.float64; it must be"),
        ((X, X, X[0], -1.0), "eps=-1.0 must be >= 0"),
        ((X.long(), X, X[0]), "torch.int64 must be"),
    ],
    ids=["residual", "weight", "type", "eps", "integers"],
)
def test_refusals_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        kernels.add_rms_norm(*arguments)
