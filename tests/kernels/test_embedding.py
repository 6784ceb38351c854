"""The scaled embedding against its definition: whole, and in rows on different ranks."""

import pytest
import torch

import kernels
from kernels.embedding import reference
from tests.kernels.support import TOLERANCE, assert_close

VOCABULARY, WIDTH, SCALE = 11, 20, 3.7


def inputs(dtype, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (3, 7), generator=generator)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    dy = torch.randn(3, 7, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    return ids.to(device), weight.to(device), dy.to(device)


def check(dtype, device="cpu"):
    ids, weight, dy = inputs(dtype, device)
    exact = weight.double().cpu().requires_grad_()
    wanted = reference.scaled_embedding(ids.cpu(), exact, SCALE)
    (dwanted,) = torch.autograd.grad(wanted, exact, dy.double().cpu())
    total, pieces = 0, []
    for start, end in ((0, 4), (4, 5), (5, 11)):
        part = weight[start:end].clone().requires_grad_()
        y = kernels.scaled_embedding(ids, part, SCALE, row_start=start, vocab_size=VOCABULARY)
        assert (y.dtype, y.shape) == (dtype, (3, 7, WIDTH))
        total = total + y.detach()
        pieces.append(torch.autograd.grad(y, part, dy)[0])
    assert_close("y dweight", (total, torch.cat(pieces)), (wanted, dwanted), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_plain_pytorch(dtype):
    check(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_triton(triton_device, dtype):
    check(dtype, triton_device)


@pytest.mark.gpu
def test_bf16_on_the_gpu(cuda):
    check(torch.bfloat16, cuda)


class Sum:
    """A gradient sum that holds something already."""

    def __init__(self, shape, device):
        self.total = torch.full(shape, 0.5, device=device)

    def begun(self):
        return self.total


def check_added(dtype, device="cpu", tokens=37, width=260):
    """As parts of a vocabulary, one id making up half of the tokens; the second time to the same sums."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (tokens,), generator=generator)
    ids[::2] = 4
    weight = torch.randn(VOCABULARY, width, generator=generator).to(device, dtype)
    dy = torch.randn(tokens, width + 4, generator=generator).to(device, dtype)[:, :width]  # rows that do not touch
    exact = weight.double().cpu().requires_grad_()
    (wanted,) = torch.autograd.grad(reference.scaled_embedding(ids, exact, SCALE), exact, dy.double().cpu())
    found = []
    for start, end in ((0, 4), (4, 5), (5, 11)):
        part, sums = weight[start:end].clone().requires_grad_(), [Sum((end - start, width), device) for _ in range(2)]
        for once in (*sums, sums[0]):
            y = kernels.scaled_embedding(
                ids.to(device), part, SCALE, row_start=start, vocab_size=VOCABULARY, gradient_sum=once
            )
            y.backward(dy)
        assert part.grad is None
        assert_close("twice", (sums[0].total - sums[1].total,), (wanted[start:end],), TOLERANCE[torch.float32])
        found.append(sums[1].total)
    assert_close("sum", (torch.cat(found) - 0.5,), (wanted,), TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_added_to_a_sum(dtype):
    check_added(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.full)], ids=str)
def test_a_gradient_added_to_a_sum_by_triton(triton_device, dtype):
    check_added(dtype, triton_device)


@pytest.mark.gpu
def test_a_gradient_added_to_a_sum_in_bf16_on_the_gpu(cuda):
    check_added(torch.bfloat16, cuda)
    check_added(torch.bfloat16, cuda, tokens=4097, width=2048)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_gradient_of_a_frequent_token(dtype):
    """Summed in fp32: in the gradient's own type the sum would stop where a term is lost to rounding."""
    weight = torch.zeros(4, 8, dtype=dtype, requires_grad=True)
    dy = torch.rand(20000, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = kernels.scaled_embedding(torch.zeros(20000, dtype=torch.int64), weight)
    (dweight,) = torch.autograd.grad(y, weight, dy)
    assert_close("dweight", [dweight[0]], [dy.double().sum(0)], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_two_steps_bit_by_bit(dtype):
    ids, weight, _ = inputs(dtype)
    assert torch.equal(kernels.scaled_embedding(ids, weight, SCALE), torch.nn.functional.embedding(ids, weight) * SCALE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": torch.zeros(3)}, "ids.dtype=torch.float32 must be int64"),
        ({"weight": torch.zeros(3)}, r"weight.shape=\(3,\)"),
        ({"row_start": -1}, "row_start=-1 must be >= 0"),
        ({"vocab_size": 3}, r"ids holds \d+, which is not in 0 .. vocab_size - 1 = 2"),
        ({"ids": torch.tensor([2, -1])}, "ids holds -1, which is not in 0"),
    ],
    ids=["type", "weight", "row_start", "vocab_size", "negative"],
)
def test_refusals_name_the_argument(changes, message):
    ids, weight, _ = inputs(torch.float32)
    with pytest.raises(ValueError, match=message):
        kernels.scaled_embedding(**({"ids": ids, "weight": weight} | changes))
