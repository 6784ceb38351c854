"""The products of fp8 operands: exact where they can be, and within a bound of fp64 where fp8 rounds."""

import pytest
import torch

from kernels import sglu
from megatron_tn.parallel import float8_products
from megatron_tn.parallel.context import Axis
from megatron_tn.precision import fp8
from megatron_tn.precision.fp8 import GRADIENT, OPERAND, Float8Weights, KeptWeights, quantized
from megatron_tn.precision.gradient_sum import GradientSum

# Of a product's relative error in norm against fp64: x and W round by up to 1/16 (e4m3), dy by up to 1/8 (e5m2).
BOUND = {"y": 0.04, "dx": 0.07, "dW": 0.07}


def integers(*shape, seed=0, most=3):
    """Of one largest element, so that products of them are exact in fp8 with any scale."""
    x = torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).float()
    x.view(-1)[0] = most
    return x


def leaves(*tensors, summed=False):
    """Copies that require gradients; with `summed`, those are added to fp32 sums."""
    copies = [tensor.clone().requires_grad_() for tensor in tensors]
    for copy in copies if summed else ():
        copy.gradient_sum = GradientSum(torch.full(copy.shape, float("nan"), device=copy.device))
    return copies


def products(x, weights, dys, *, summed, held=None, microbatches=1):
    """[y_i], dx, [dW_i] of fp8's linear layers; with `summed`, the dW from fp32 sums over equal microbatches."""
    (x,), weights = leaves(x), leaves(*weights, summed=summed)
    for _ in range(microbatches):
        x.grad = None
        ys = float8_products.columns(x, weights, held or Float8Weights(), Axis())
        torch.autograd.backward(ys, dys)
    return ys, x.grad, [weight.gradient_sum.value if summed else weight.grad for weight in weights]


def check_exact(device):
    """Sizes that MULTIPLE divides and others; fp32 and bf16; two layers of one input; three microbatches."""
    for tokens, ins, outs in ((32, 48, (64, 16)), (21, 40, (24, 9))):
        x, dys = integers(tokens, ins), [integers(tokens, out, seed=out) for out in outs]
        weights = [integers(out, ins, seed=out + 1) for out in outs]
        x, *rest = (tensor.to(device) for tensor in (x, *dys, *weights))
        dys, weights, held = rest[:2], rest[2:], Float8Weights()
        kept = KeptWeights([held], [[weight.shape for weight in weights]], x.device)
        kept.quantize([weights])
        for dtype in (torch.float32, torch.bfloat16):
            for summed, kept in ((True, held), (False, None)):
                cast = [tensor.to(dtype) for tensor in (x, *weights, *dys)]
                ys, dx, dws = products(
                    cast[0], cast[1:3], cast[3:], summed=summed, held=kept, microbatches=3 if summed else 1
                )
                for y, weight in zip(ys, weights, strict=True):
                    assert torch.equal(y, (x @ weight.t()).to(dtype))
                wanted = sum(dy @ weight for dy, weight in zip(dys, weights, strict=True))
                assert torch.equal(dx, wanted.to(dtype))
                for dw, dy in zip(dws, dys, strict=True):
                    assert torch.equal(dw, 3 * dy.t() @ x if summed else (dy.t() @ x).to(dtype))


def test_integers_are_exact():
    check_exact("cpu")


@pytest.mark.gpu
def test_integers_are_exact_on_the_gpu():
    check_exact("cuda")


def check_bound(device, dtype):
    draw = torch.Generator().manual_seed(1)
    x, weight, dy = (torch.randn(shape, generator=draw).to(device) for shape in ((200, 130), (90, 130), (200, 90)))
    x, weight, dy = x.to(dtype), 0.02 * weight.to(dtype), 1e-6 * dy.exp().to(dtype)
    (y,), dx, (dw,) = products(x, [weight], [dy], summed=True)
    x, weight, dy = x.double(), weight.double(), dy.double()
    for name, found, wanted in (("y", y, x @ weight.t()), ("dx", dx, dy @ weight), ("dW", dw, dy.t() @ x)):
        assert ((found - wanted).norm() / wanted.norm()).item() <= BOUND[name], name


def test_error_against_fp64():
    check_bound("cpu", torch.bfloat16)


@pytest.mark.gpu
def test_error_against_fp64_on_the_gpu():
    check_bound("cuda", torch.bfloat16)


@pytest.mark.gpu
def test_the_gpu_agrees_with_the_emulation():
    """The same fp8 numbers; only the tensor cores' sums differ from fp32's."""
    draw = torch.Generator().manual_seed(2)
    a, b = (quantized(torch.randn(96, 512, generator=draw), dtype) for dtype in (OPERAND, GRADIENT))
    wanted = fp8.scaled_product(a.rows, b.rows, (a.scale, b.scale), 96, torch.float32)
    there = [tensor.to("cuda") for tensor in (a.rows, b.rows, a.scale, b.scale)]
    found = fp8.scaled_product(*there[:2], tuple(there[2:]), 96, torch.float32).cpu()
    assert ((found - wanted).norm() / wanted.norm()).item() < 1e-3


def check_gated_unit(device):
    """The gated unit makes the numbers of its parts, each a layer of its own."""
    draw = torch.Generator().manual_seed(3)
    shapes = (19, 32), (24, 32), (24, 32), (32, 24), (19, 32)
    *tensors, dy = (torch.randn(shape, generator=draw).to(device) for shape in shapes)
    found, wanted = leaves(*tensors), leaves(*tensors)
    x, *weights = found
    y = float8_products.gated_unit(x, tuple(weights), (Float8Weights(), Float8Weights()), Axis(), 0, "silu")
    y.backward(dy)
    x, first, second, third = wanted
    inner = sglu(*float8_products.columns(x, [first, second], Float8Weights(), Axis()), "silu")
    other, _ = float8_products.row(inner, third, Float8Weights(), Axis())
    other.backward(dy)
    assert torch.equal(y, other)
    for one, another in zip(found, wanted, strict=True):
        assert torch.equal(one.grad, another.grad)


def test_the_gated_unit_is_its_parts():
    check_gated_unit("cpu")


@pytest.mark.gpu
def test_the_gated_unit_is_its_parts_on_the_gpu():
    check_gated_unit("cuda")


def check_non_finite(device):
    """One number that is not finite anywhere makes results NaN, which the step's norm sees."""
    good = [integers(16, 32), integers(48, 32), integers(16, 48)]
    for place, value in ((place, value) for place in range(3) for value in (float("nan"), float("inf"))):
        x, weight, dy = (tensor.to(device) for tensor in good)
        (x, weight, dy)[place][5, 7] = value
        (y,), dx, (dw,) = products(x, [weight], [dy], summed=True)
        assert y.isnan().all() == (place < 2)
        assert dx.isnan().all() == (place > 0)
        assert dw.isnan().all() == (place != 1)
        good[place] = good[place].nan_to_num(0, 0, 0)


def test_what_is_not_finite_is_seen():
    check_non_finite("cpu")


@pytest.mark.gpu
def test_what_is_not_finite_is_seen_on_the_gpu():
    check_non_finite("cuda")
