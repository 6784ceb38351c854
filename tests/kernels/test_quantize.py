"""Quantisation to fp8 against its definition: plain, in Triton's interpreter and on a GPU."""

import pytest
import torch

from kernels import dispatch
from kernels.quantize import op, reference
from kernels.quantize.many import ManyMatrices, stacked

TYPES = pytest.mark.parametrize("dtype", op.TYPES, ids=str)
SHAPES = pytest.mark.parametrize("shape", [(33, 70), (64, 144)], ids=str)


def bits(x):
    return x.contiguous().view(torch.uint8).cpu()


def check(x, dtype, device="cpu"):
    """Bit for bit: x / scale in each order, zeros around it, and the scale."""
    x = x.to(device)
    count, width = x.shape
    rows, transposed, scale = op.quantize(x, op.largest(x), dtype)
    wanted, wanted_scale = reference.quantize(x.cpu(), reference.largest(x.cpu()), dtype)
    assert scale.item() == wanted_scale.item()
    assert torch.equal(bits(rows[:, :width]), bits(wanted))
    assert torch.equal(bits(transposed[:width, :count].t()), bits(wanted))
    assert bits(rows)[:, width:].sum() == bits(transposed)[width:].sum() == bits(transposed)[:, count:].sum() == 0
    assert torch.equal(bits(op.transpose(rows)), bits(transposed))
    only, empty, _ = op.quantize(x, op.largest(x), dtype, transposed=False)
    assert torch.equal(bits(only), bits(rows))
    assert not empty.numel()
    empty, only, _ = op.quantize(x, op.largest(x), dtype, rows=False)
    assert torch.equal(bits(only), bits(transposed))
    assert not empty.numel()
    again = [torch.zeros_like(each) for each in (rows, transposed, scale)]
    op.quantize_(x, op.largest(x), *again)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(again, (rows, transposed, scale), strict=True))


def heavy_tailed(*shape):
    draw = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=draw) * torch.randn(shape, generator=draw).mul(2).exp()


@TYPES
@SHAPES
def test_plain(shape, dtype):
    check(heavy_tailed(*shape).bfloat16(), dtype)


@TYPES
@SHAPES
def test_triton(triton_device, shape, dtype):
    """Of numbers that fp8 holds: Triton's interpreter rounds others wrongly (findings/triton_interpreter_fp8.sh)."""
    x = heavy_tailed(*shape).bfloat16()
    exact, scale = reference.quantize(x, reference.largest(x), dtype)
    check(exact.float() * scale, dtype, triton_device)


@pytest.mark.gpu
@TYPES
@pytest.mark.parametrize("shape", [(1000, 200), (513, 1376), (16, 2048)], ids=str)
def test_rounding_on_the_gpu(cuda, shape, dtype):
    for x in (heavy_tailed(*shape).bfloat16(), heavy_tailed(*shape)):
        check(x, dtype, cuda)


def check_many(device, heights):
    """Two groups, one of two matrices that are not neighbours in memory; again at other addresses."""
    draw = torch.Generator().manual_seed(3)
    shapes = [[torch.Size((height, 80)) for height in heights], [torch.Size((48, 144))]]
    many = ManyMatrices(shapes, torch.float8_e4m3fn, torch.device(device))
    for _ in range(2):
        values = [[torch.randint(-7, 8, shape, generator=draw) / 4 for shape in group] for group in shapes]
        values[0][1][3, 5] = 448.0
        groups = [[value.bfloat16().to(device) for value in group] for group in values]
        many.quantize_(groups)
        assert (many.plan is None) == (
            (device == "cpu" and dispatch.requested_backend() != "triton") or heights[0] % 16 > 0
        )
        rows = ManyMatrices(shapes, torch.float8_e4m3fn, torch.device(device), transposed=False)
        rows.quantize_(groups)
        for (one, none, scale), (other, _, wanted) in zip(rows.operands, many.operands, strict=True):
            assert torch.equal(bits(one), bits(other))
            assert torch.equal(scale, wanted)
            assert not none.numel()
        for group, operand in zip(groups, many.operands, strict=True):
            whole = torch.cat(group)
            assert torch.equal(stacked(group), whole)
            for found, wanted in zip(operand, op.quantize(whole, op.largest(whole), torch.float8_e4m3fn), strict=True):
                assert torch.equal(bits(found), bits(wanted))


def test_many():
    check_many("cpu", (32, 16))
    flat = torch.arange(60.0)
    neighbours = [flat[:20].view(4, 5), flat[20:50].view(6, 5)]
    assert stacked(neighbours).data_ptr() == flat.data_ptr()
    assert torch.equal(stacked(neighbours), flat[:50].view(10, 5))
    assert torch.equal(stacked(neighbours[::-1]), torch.cat(neighbours[::-1]))


@pytest.mark.parametrize("heights", [(32, 16), (9, 16)], ids=str)
def test_many_in_triton(triton_device, heights, monkeypatch):
    # The kernel finds the other matrices by their distance from the first, which a copy does not keep.
    monkeypatch.setattr(torch.UntypedStorage, "cpu", lambda storage: storage)
    check_many(triton_device, heights)


@TYPES
def test_the_scale_is_the_least_power_of_two_that_holds_the_largest(dtype):
    most = torch.finfo(dtype).max
    for largest in (1.0, 1.75, 1.7500001, 448.0, 3e-5, 57344.0, 2.0**-120, 3e38):
        scale, inverse = reference.scale_of(torch.tensor([largest]).view(torch.int32), dtype)
        assert scale.item() == 2.0 ** round(torch.log2(scale).item())
        assert scale * inverse == 1
        assert largest <= most * scale.item()
        assert largest > most * scale.item() / 2 or scale.item() == 2.0**-126


def check_non_finite(device):
    for value in (float("nan"), float("inf"), -float("inf")):
        for dtype in op.TYPES:
            x = torch.ones(20, 30, device=device)
            x[3, 4] = value
            assert op.quantize(x, op.largest(x), dtype)[2].isnan().all()


def test_what_is_not_finite_makes_the_scale_nan():
    check_non_finite("cpu")


def test_what_is_not_finite_makes_the_scale_nan_in_triton(triton_device):
    check_non_finite(triton_device)


def test_zeros_stay_zeros():
    rows, _, scale = op.quantize(torch.zeros(3, 5), op.largest(torch.zeros(3, 5)), torch.float8_e4m3fn)
    assert rows.float().abs().sum() == 0
    assert 0 < scale.item() < 1e-30


def test_refusals_name_the_argument():
    with pytest.raises(ValueError, match=r"x.shape=\(2, 3, 4\), torch.float32 to torch.float8_e4m3fn"):
        op.quantize(torch.zeros(2, 3, 4), op.largest(torch.zeros(1)), torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"to torch\.float16"):
        op.quantize(torch.zeros(2, 3), op.largest(torch.zeros(1)), torch.float16)
