"""SimpleRMSNorm against its fp64 definition, in PyTorch and in Triton."""

import pytest
import torch

import kernels
from kernels.quantize.noted import noted
from kernels.quantize.op import largest
from kernels.srmsnorm import reference
from tests.kernels.support import TOLERANCE, assert_close


def check(shape, dtype, device, eps=1e-6, scale=1.0):
    torch.manual_seed(0)
    x = (torch.randn(shape, dtype=torch.float64) * scale).to(device, dtype).requires_grad_()
    dy = torch.randn(shape, dtype=torch.float64).to(device, dtype)
    y = kernels.simple_rms_norm(x, eps)
    (dx,) = torch.autograd.grad(y, x, dy)
    exact = x.detach().double().cpu().requires_grad_()
    expected = reference.simple_rms_norm(exact, eps)
    (dexpected,) = torch.autograd.grad(expected, exact, dy.double().cpu())
    assert (y.dtype, y.shape, dx.dtype) == (dtype, x.shape, dtype)
    tolerance = max(TOLERANCE[dtype] / 10, 1e-12) if dtype.itemsize >= 4 else TOLERANCE[dtype]
    assert_close("y dx", (y, dx), (expected, dexpected), tolerance)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", [(7,), (3, 8), (2, 5, 257), (4, 2048)], ids=str)
def test_torch(shape, dtype):
    check(shape, dtype, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(7,), (3, 8), (2, 5, 257), (4, 2048)], ids=str)
def test_triton(triton_device, shape, dtype):
    check(shape, dtype, triton_device)


def check_add(shape, dtype, device):
    """Against the two operators one after the other, in fp64 from the rounded sum on."""
    torch.manual_seed(0)
    x, r = ((torch.randn(shape, dtype=torch.float64)).to(device, dtype).requires_grad_() for _ in range(2))
    ds, dy = ((torch.randn(shape, dtype=torch.float64)).to(device, dtype) for _ in range(2))
    s, y = kernels.add_simple_rms_norm(x, r)
    dx, dr = torch.autograd.grad((s, y), (x, r), (ds, dy))
    assert torch.equal(s, x + r)
    assert torch.equal(dx, dr)
    exact = s.detach().double().cpu().requires_grad_()
    expected = reference.simple_rms_norm(exact, 1e-6)
    (dexpected,) = torch.autograd.grad((exact * 1, expected), exact, (ds.double().cpu(), dy.double().cpu()))
    assert (y.dtype, y.shape, dx.dtype) == (dtype, x.shape, dtype)
    tolerance = max(TOLERANCE[dtype] / 10, 1e-12) if dtype.itemsize >= 4 else TOLERANCE[dtype]
    assert_close("y dx", (y, dx), (expected, dexpected), tolerance)


def check_add_scaled(shape, dtype, device):
    """Sum and gradients against the two operators one after the other in fp64; the norm against that of the sum."""
    torch.manual_seed(0)
    x, r = ((torch.randn(shape, dtype=torch.float64)).to(device, dtype).requires_grad_() for _ in range(2))
    wide = torch.promote_types(dtype, torch.float32)
    squares = (torch.rand(shape[:-1], dtype=torch.float64) * shape[-1] * 3).to(device, wide).requires_grad_()
    ds, dy = ((torch.randn(shape, dtype=torch.float64)).to(device, dtype) for _ in range(2))
    s, y = kernels.add_scaled_simple_rms_norm(x, r, squares)
    found = torch.autograd.grad((s, y), (x, r, squares), (ds, dy))
    assert [z.dtype for z in (s, y, *found)] == [dtype] * 4 + [wide]
    exact = [z.detach().double().cpu().requires_grad_() for z in (x, r, squares)]
    total = exact[0] + reference.rms_scaled(*exact[1:], width=shape[-1])
    # The norm is of the sum as it was rounded.
    rounded = total + (s.detach().double().cpu() - total.detach())
    expected = reference.simple_rms_norm(rounded, 1e-6)
    wanted = torch.autograd.grad((rounded, expected), exact, (ds.double().cpu(), dy.double().cpu()))
    tolerance = max(TOLERANCE[dtype] / 10, 1e-12) if dtype.itemsize >= 4 else TOLERANCE[dtype]
    assert_close("s y dx dr dsquares", (s, y, *found), (total, expected, *wanted), tolerance)


RESIDUALS = pytest.mark.parametrize("check", [check_add, check_add_scaled], ids=["added", "to be scaled"])


@RESIDUALS
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", [(7,), (2, 5, 257)], ids=str)
def test_torch_with_a_residual(check, shape, dtype):
    check(shape, dtype, "cpu")


@RESIDUALS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(7,), (2, 5, 257), (4, 2048)], ids=str)
def test_triton_with_a_residual(triton_device, check, shape, dtype):
    check(shape, dtype, triton_device)


@pytest.mark.gpu
@RESIDUALS
@pytest.mark.parametrize("width", [2560, 4096])
def test_bf16_with_a_residual_on_the_gpu(cuda, check, width):
    check((33, width), torch.bfloat16, cuda)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_a_branch_leaves_the_stream_as_it_is(dtype):
    """Equal to the norm beside the stream itself, whichever of the two results a loss depends on."""
    torch.manual_seed(0)
    x = torch.randn(3, 5, 33, dtype=dtype)
    dstream, dnormed = torch.randn_like(x), torch.randn_like(x)
    for used in [(0,), (1,), (0, 1)]:
        leaf, same = (x.clone().requires_grad_() for _ in range(2))
        stream, normed = kernels.branch_simple_rms_norm(leaf * 1)
        assert torch.equal(stream, x)
        assert torch.equal(normed, kernels.simple_rms_norm(x))
        exact = same * 1
        pairs = [((stream, dstream), (exact, dstream)), ((normed, dnormed), (kernels.simple_rms_norm(exact), dnormed))]
        (dx,) = torch.autograd.grad([pairs[i][0][0] for i in used], leaf, [pairs[i][0][1] for i in used])
        (expected,) = torch.autograd.grad([pairs[i][1][0] for i in used], same, [pairs[i][1][1] for i in used])
        assert_close("dx", (dx,), (expected,), TOLERANCE[dtype])


def check_noted(device):
    """Gradients that fp8 products quantise come with their largest elements, and are those without."""
    torch.manual_seed(0)
    x, r, ds, dy = (torch.randn(3, 5, 257).to(device, torch.float16) for _ in range(4))
    squares = 300 * torch.rand(3, 5, device=device)
    for norm, inputs in (
        (kernels.add_scaled_simple_rms_norm, (x, r, squares)),
        (kernels.branch_simple_rms_norm, (x,)),
    ):
        leaves = [z.clone().requires_grad_() for z in inputs]
        found, wanted = (
            torch.autograd.grad(norm(*leaves, noting=noting), leaves, (ds, dy)) for noting in (True, False)
        )
        assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
        gradient = found[min(1, len(found) - 1)]
        assert torch.equal(noted(gradient.flatten(0, 1)).amax(), largest(gradient).amax())
        assert noted(gradient[:2]) is None
        assert noted(wanted[0]) is None
        gradient.add_(1)
        assert noted(gradient) is None


def test_the_largest_element_is_noted():
    check_noted("cpu")


def test_the_largest_element_is_noted_in_triton(triton_device):
    check_noted(triton_device)


def test_the_residual_must_fit():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"residual is \(3,\) torch.float32; they must be alike"):
        kernels.add_simple_rms_norm(x, torch.ones(3))
    with pytest.raises(ValueError, match=r"residual is \(3,\) torch.float32; they must be alike"):
        kernels.add_scaled_simple_rms_norm(x, torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match=r"square_sum is \(3,\) torch.float32; it must be x.shape\[:-1\]=\(2,\)"):
        kernels.add_scaled_simple_rms_norm(x, x, torch.ones(3))
    with pytest.raises(ValueError, match=r"square_sum is \(2,\) torch.float64; .* of torch.float32"):
        kernels.add_scaled_simple_rms_norm(x, x, torch.ones(2).double())


@pytest.mark.gpu
@pytest.mark.parametrize("width", [80, 1024, 2560, 4096, 12288])
def test_bf16_on_the_gpu(cuda, width):
    check((33, width), torch.bfloat16, cuda)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_eps_and_scale(scale):
    check((5, 64), torch.float32, "cpu", eps=1e-3, scale=scale)


def test_bf16_statistics_are_not_rounded():
    x = torch.full((1, 4096), 1.0, dtype=torch.bfloat16)
    assert torch.equal(kernels.simple_rms_norm(x, eps=0.0), x)  # a bf16 sum of squares would stop at 256


def test_strided_rows(triton_device):
    x = torch.randn(6, 3, 40, device=triton_device)[:, 1]
    assert torch.equal(kernels.simple_rms_norm(x), kernels.simple_rms_norm(x.clone()))


def test_refusals_name_the_argument():
    with pytest.raises(ValueError, match="eps=-1 must be >= 0"):
        kernels.simple_rms_norm(torch.ones(2), eps=-1)
    with pytest.raises(ValueError, match="eps=nan must be >= 0"):
        kernels.simple_rms_norm(torch.ones(2), eps=float("nan"))
    with pytest.raises(ValueError, match=r"x.dtype=torch.int64 must be"):
        kernels.simple_rms_norm(torch.ones(2, dtype=torch.int64))
