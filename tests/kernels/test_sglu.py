"""SGLU's product against its fp64 definition: plain, in Triton's interpreter and on a GPU."""

import pytest
import torch

import kernels
from kernels.activations.plain import NAMES
from kernels.sglu import reference
from kernels.sglu.op import sglu_pair_backward, sglu_pair_forward
from tests.kernels.support import TOLERANCE, assert_close

ACTS = pytest.mark.parametrize("act", NAMES)


def check(shape, dtype, act="none", device="cpu"):
    generator = torch.Generator().manual_seed(0)
    a, b, dy = (torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(3))
    inputs = [a.requires_grad_(), b.requires_grad_()]
    out = kernels.sglu(*inputs, act)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    wanted = reference.sglu(*exact, act)
    values = (out, *torch.autograd.grad(out, inputs, dy))
    assert all(x.dtype == dtype for x in values)
    assert_close("y da db", values, (wanted, *torch.autograd.grad(wanted, exact, dy.double())), TOLERANCE[dtype])


@ACTS
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_plain(dtype, act):
    check((3, 5, 31), dtype, act)


@ACTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_triton(triton_device, dtype, act):
    check((3, 5, 431), dtype, act, triton_device)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [1024, 2560, 4096, 12288])
def test_bf16_on_the_gpu(cuda, width):
    check((33, width), torch.bfloat16, device=cuda)


def test_views_of_a_fused_projection():
    fused = torch.randn(4, 20, requires_grad=True)
    a, b = fused.chunk(2, dim=-1)
    out = kernels.sglu(a, b)
    assert torch.equal(out, (a * b))
    out.sum().backward()
    assert torch.equal(fused.grad, torch.cat((b, a), dim=-1))


def test_triton_takes_strided_rows(triton_device):
    a, b = torch.randn(6, 3, 80, device=triton_device)[:, 1].chunk(2, dim=-1)
    assert torch.equal(kernels.sglu(a, b), kernels.sglu(a.clone(), b.clone()))


def check_pair(device):
    pair, dy = torch.randn(5, 802, device=device), torch.randn(5, 401, device=device)
    (a, b), leaf = pair.chunk(2, dim=-1), pair.clone().requires_grad_()
    product, bits = sglu_pair_forward(pair, "silu")
    gradient, gradient_bits = sglu_pair_backward(dy, pair, "silu")
    wanted = kernels.sglu(*leaf.chunk(2, dim=-1), "silu")
    wanted.backward(dy)
    assert torch.equal(product, kernels.sglu(a, b, "silu"))
    assert torch.equal(gradient, leaf.grad)
    for value, found in ((product, bits), (gradient, gradient_bits)):
        assert found.amax().view(torch.float32) == value.abs().amax()


def test_pair():
    check_pair("cpu")


def test_pair_in_triton(triton_device):
    check_pair(triton_device)


ONES = torch.ones(1, 4, 2, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ONES, ONES, "gelu"), "act='gelu' is not one of"),
        ((ONES, ONES[0]), r"b is \(4, 2, 6\)"),
        ((ONES.long(), ONES.long()), "a.dtype=torch.int64 is not a floating type"),
    ],
    ids=["act", "shape", "type"],
)
def test_refusals_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        kernels.sglu(*arguments)
