"""Norm and gate, SGLU, LRPE and the activations against their fp64 definitions."""

import math

import pytest
import torch

import kernels
from kernels.lrpe import reference as lrpe_reference
from kernels.norm_gate import reference as norm_gate_reference
from kernels.sglu import reference as sglu_reference
from tests.kernels.support import TOLERANCE, assert_close, relative_error


def leaves(*shapes, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def exactly(tensors):
    return [x.detach().double().requires_grad_() for x in tensors]


def compare(names, function, definition, inputs, tolerance):
    """Outputs and every gradient of `function` against the fp64 `definition`; both return one tensor."""
    out, expected_inputs = function(*inputs), exactly(inputs)
    expected = definition(*expected_inputs)
    torch.manual_seed(1)
    gradient = torch.randn(out.shape, dtype=torch.float64).to(out.device, out.dtype)
    values = torch.autograd.grad(out, inputs, gradient)
    wanted = torch.autograd.grad(expected, expected_inputs, gradient.double())
    assert [x.dtype for x in (out, *values)] == [x.dtype for x in (inputs[0], *inputs)]
    assert_close(names, (out, *values), (expected, *wanted), tolerance)


def norm_gate(o, u):
    """The two steps as one rank of one would take them."""
    y, square_sum = kernels.gate_with_square_sum(o, u)
    return kernels.apply_rms_scale(y, square_sum, width=o.shape[-1])


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", [(8,), (2, 3, 65)], ids=str)
def test_norm_and_gate(shape, dtype):
    inputs = leaves(shape, shape, dtype=dtype)
    compare("y do du", norm_gate, norm_gate_reference.norm_gate, inputs, TOLERANCE[dtype])


def test_norm_and_gate_over_two_ranks():
    """Each holds half the width; the sums of squares are added between the steps."""
    o, u = leaves((4, 32), (4, 32), dtype=torch.float64)

    def split(o, u):
        pieces = [kernels.gate_with_square_sum(o[:, s], u[:, s]) for s in (slice(0, 16), slice(16, 32))]
        total = pieces[0][1] + pieces[1][1]
        return torch.cat([kernels.apply_rms_scale(y, total, width=32) for y, _ in pieces], dim=1)

    compare("y do du", split, norm_gate_reference.norm_gate, [o, u], 1e-12)


def test_square_sum_is_fp32_and_differentiable_alone():
    o, u = leaves((5, 300), (5, 300), dtype=torch.bfloat16)
    _, square_sum = kernels.gate_with_square_sum(o, u)
    assert square_sum.dtype == torch.float32
    do, du = torch.autograd.grad(square_sum.sum(), (o, u))
    assert relative_error(square_sum, o.double().square().sum(-1)) < 1e-6
    assert relative_error(do, 2 * o.double()) < 1e-6
    assert not du.any()


@pytest.mark.parametrize("act", ["none", "silu"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_sglu(dtype, act):
    compare(
        "y da db",
        lambda a, b: kernels.sglu(a, b, act),
        lambda a, b: sglu_reference.sglu(a, b, act),
        leaves((3, 5, 31), (3, 5, 31), dtype=dtype),
        TOLERANCE[dtype],
    )


def test_sglu_takes_views_of_a_fused_projection():
    fused = torch.randn(4, 20, requires_grad=True)
    a, b = fused.chunk(2, dim=-1)
    out = kernels.sglu(a, b)
    assert torch.equal(out, (a * b))
    out.sum().backward()
    assert torch.equal(fused.grad, torch.cat((b, a), dim=-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(8,), (2, 3, 65), (3, 2500)], ids=str)
def test_triton_norm_and_gate(triton_device, shape, dtype):
    inputs = [x.detach().to(triton_device).requires_grad_() for x in leaves(shape, shape, dtype=dtype)]
    compare("y do du", norm_gate, norm_gate_reference.norm_gate, inputs, TOLERANCE[dtype])


@pytest.mark.parametrize("act", ["none", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_triton_sglu(triton_device, dtype, act):
    inputs = [x.detach().to(triton_device).requires_grad_() for x in leaves((3, 5, 431), (3, 5, 431), dtype=dtype)]
    compare(
        "y da db",
        lambda a, b: kernels.sglu(a, b, act),
        lambda a, b: sglu_reference.sglu(a, b, act),
        inputs,
        TOLERANCE[dtype],
    )


def test_triton_takes_strided_rows(triton_device):
    o, u = torch.randn(6, 3, 80, device=triton_device)[:, 1].chunk(2, dim=-1)
    y, square_sum = kernels.gate_with_square_sum(o, u)
    plain, plain_sum = kernels.gate_with_square_sum(o.clone(), u.clone())
    assert torch.equal(y, plain)
    assert relative_error(square_sum, plain_sum) < 1e-6  # summed in another order: unaligned rows are read otherwise
    assert torch.equal(kernels.sglu(o, u), kernels.sglu(o.clone(), u.clone()))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [1024, 2560, 4096, 12288])
def test_bf16_on_the_gpu(cuda, width):
    inputs = [x.detach().to(cuda).requires_grad_() for x in leaves((33, width), (33, width), dtype=torch.bfloat16)]
    compare("y do du", norm_gate, norm_gate_reference.norm_gate, inputs, TOLERANCE[torch.bfloat16])
    compare("y da db", kernels.sglu, sglu_reference.sglu, inputs, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("batched", [False, True], ids=["shared", "per-row"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_lrpe(dtype, batched):
    (x,) = leaves((2, 33, 3, 8), dtype=dtype)
    (theta,) = leaves((3, 1, 8), dtype=torch.float64 if dtype == torch.float64 else torch.float32, seed=1)
    positions = torch.arange(33) if not batched else torch.stack((torch.arange(33), torch.arange(40, 7, -1)))
    compare(
        "y dx dtheta",
        lambda x, theta: kernels.lrpe(x, theta, positions),
        lambda x, theta: lrpe_reference.lrpe(x, theta, positions),
        [x, theta],
        TOLERANCE[dtype],
    )


@pytest.mark.parametrize("position", [65_537, 1_000_003])
def test_lrpe_angles_at_long_positions(position):
    """A plain fp32 product would be off by 2e-3 and 3e-2 here."""
    (theta,) = leaves((2, 1, 64), dtype=torch.float32)
    x = torch.ones(1, 1, 2, 64)
    y = kernels.lrpe(x, theta, torch.tensor([position], dtype=torch.int32))
    angle = theta.detach().double()[:, 0] * position
    expected = torch.cat((angle.cos(), angle.sin()), dim=-1)[None, None]
    assert (y.double() - expected).abs().max() < 3e-7


def test_lrpe_keeps_relative_positions():
    """<lrpe(x, s), lrpe(y, t)> depends on s - t alone."""
    x, y = leaves((1, 1, 1, 16), (1, 1, 1, 16), dtype=torch.float64)
    (theta,) = leaves((1, 1, 16), dtype=torch.float64, seed=3)

    def product(s, t):
        return (kernels.lrpe(x, theta, torch.tensor([s])) * kernels.lrpe(y, theta, torch.tensor([t]))).sum().item()

    assert math.isclose(product(7, 3), product(100_007, 100_003), rel_tol=1e-9)


@pytest.mark.parametrize(
    ("name", "definition"),
    [
        ("none", lambda x: x),
        ("silu", lambda x: x / (1 + torch.exp(-x))),
        ("1+elu", lambda x: torch.where(x > 0, 1 + x, torch.exp(x))),
    ],
)
def test_activation(name, definition):
    compare("y dx", lambda x: kernels.activation(x, name), definition, leaves((5, 7), dtype=torch.float64), 1e-12)


ONES = torch.ones(1, 4, 2, 6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernels.activation(ONES, "relu"), "name='relu' is not one of the activations"),
        (lambda: kernels.sglu(ONES, ONES, "gelu"), "act='gelu' is not one of"),
        (lambda: kernels.sglu(ONES, ONES[0]), r"b is \(4, 2, 6\)"),
        (lambda: kernels.gate_with_square_sum(ONES, ONES.half()), "u is .* torch.float16"),
        (lambda: kernels.sglu(ONES.long(), ONES.long()), "a.dtype=torch.int64 is not a floating type"),
        (lambda: kernels.gate_with_square_sum(ONES.long(), ONES.long()), "o.dtype=torch.int64 must be"),
        (lambda: kernels.gate_with_square_sum(ONES.sum(), ONES.sum()), r"o.shape=\(\), .* must be \[..., D\]"),
        (lambda: kernels.apply_rms_scale(ONES, ONES[..., 0], 6, float("nan")), "eps=nan >= 0"),
        (lambda: kernels.apply_rms_scale(ONES, ONES, 6), "square_sum.shape=.* must be y.shape"),
        (lambda: kernels.apply_rms_scale(ONES, ONES[..., 0].half(), 6), "square_sum.dtype=torch.float16"),
        (lambda: kernels.apply_rms_scale(ONES, ONES[..., 0], 0), "width=0 must be >= 1"),
        (lambda: kernels.lrpe(ONES, torch.ones(2, 1, 5), torch.arange(4)), "theta.shape=.* must be"),
        (lambda: kernels.lrpe(ONES, torch.ones(2, 1, 6), torch.arange(3)), "positions.shape="),
        (lambda: kernels.lrpe(ONES, torch.ones(2, 1, 6), torch.ones(4)), "positions.dtype=torch.float32"),
    ],
)
def test_refusals_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
