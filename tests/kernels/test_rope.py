"""RoPE against its fp64 definition: plain, in Triton's interpreter and on a GPU."""

import pytest
import torch

import kernels
from kernels.rope import reference
from tests.kernels.support import TOLERANCE, assert_close, strided


def check(dtype, device="cpu", heads=3, head_dim=16, start=0):
    generator = torch.Generator().manual_seed(0)
    shape = (2, 7, heads * head_dim)
    q, k, dq, dk = (torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(4))
    positions = torch.cat((torch.arange(4), torch.arange(3))).to(device) + start
    inputs = [q.requires_grad_(), k.requires_grad_()]
    out = kernels.rope(*inputs, positions, head_dim=head_dim)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    wanted = [reference.rope(x, positions, head_dim=head_dim) for x in exact]
    gradients = torch.autograd.grad(out, inputs, (dq, dk))
    assert all(x.dtype == dtype and x.is_contiguous() for x in (*out, *gradients))
    expected = [*wanted, *torch.autograd.grad(wanted, exact, (dq.double(), dk.double()))]
    # At a position of millions fp64 itself rounds the definition's angle.
    assert_close("q k dq dk", [*out, *gradients], expected, max(TOLERANCE[dtype], 1e-15 * start))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_plain(dtype):
    check(dtype)
    check(dtype, start=3_000_000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "head_dim"), [(3, 16), (5, 48), (1, 256), (17, 128)])
def test_triton(triton_device, dtype, heads, head_dim):
    check(dtype, triton_device, heads, head_dim, start=3_000_000 if head_dim == 48 else 0)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "head_dim"), [(8, 128), (16, 128), (32, 128), (8, 64)])
def test_bf16_on_the_gpu(cuda, heads, head_dim):
    check(torch.bfloat16, cuda, heads, head_dim, start=100_000)


def test_scores_depend_on_distance_alone():
    q, k = torch.randn(2, 1, 1, 8, dtype=torch.float64).expand(2, 1, 6, 8)
    q, k = kernels.rope(q, k, torch.arange(6), head_dim=8)
    scores = q[0] @ k[0].T
    for distance in range(-5, 6):
        assert scores.diagonal(distance).std(correction=0) < 1e-14


def test_triton_takes_strided_rows(triton_device):
    q, k = (strided(torch.randn(2, 5, 32, device=triton_device)) for _ in range(2))
    found, wanted = (kernels.rope(*x, torch.arange(5, device=triton_device), head_dim=16)
                     for x in ((q, k), (q.contiguous(), k.contiguous())))  # fmt: skip
    assert all(map(torch.equal, found, wanted))


X = torch.ones(1, 4, 12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, X[..., :6], torch.arange(4), 6), r"k is \(1, 4, 6\)"),
        ((X, X, torch.arange(4), 8), "head_dim=8 must be even and divide the width 12"),
        ((X, X, torch.arange(4), 3), "head_dim=3 must be even"),
        ((X, X, torch.arange(5), 6), r"positions is \(5,\) torch.int64; it must be \(4,\)"),
        ((X, X, torch.arange(4.0), 6), "torch.float32; it must be"),
    ],
    ids=["shapes", "width", "odd", "positions", "type"],
)
def test_refusals_name_the_argument(arguments, message):
    q, k, positions, head_dim = arguments
    with pytest.raises(ValueError, match=message):
        kernels.rope(q, k, positions, head_dim=head_dim)
