"""AdamW's update against the definition in fp64: plain, in Triton's interpreter and on a GPU."""

import pytest
import torch

import kernels
from kernels.adamw import op, reference
from tests.kernels.support import relative_error

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
ELEMENTS = 4 * 1024 + 37  # whole programs, and a part of one


def inputs(device: str = "cpu", elements: int = ELEMENTS) -> list[torch.Tensor]:
    """Master, gradient and moments as they are in the middle of a training run."""
    draw = torch.Generator().manual_seed(0)
    master, gradient, first, second = (torch.randn(elements, generator=draw) for _ in range(4))
    return [x.to(device) for x in (master, gradient * 1e-3, first * 1e-3, second.square() * 1e-6)]


def check(device: str, step: int, divisor: float | None, dtype: torch.dtype | None) -> None:
    tensors = inputs(device)
    wide = [x.double() for x in tensors]
    if divisor is not None:
        wide[1] = wide[1] / divisor
    wanted = reference.adamw(*wide, **SETTINGS, step=step)
    gradient = tensors[1].clone()
    copy = None if dtype is None else torch.full_like(tensors[0], float("nan"), dtype=dtype)
    scalar = None if divisor is None else torch.tensor(divisor, device=device)
    kernels.adamw_(*tensors, **SETTINGS, step=step, divisor=scalar, copy=copy)
    master, after, *moments = tensors
    assert torch.equal(after, gradient)
    for found, exact in zip((master, *moments), wanted, strict=True):
        assert relative_error(found, exact) < 1e-6
    if copy is not None:
        assert torch.equal(copy, master.to(dtype))


CASES = pytest.mark.parametrize(
    ("step", "divisor", "dtype"),
    [(1, None, None), (1, 3.0, torch.float16), (7, 1.0, torch.bfloat16), (100_000, 0.5, torch.float32)],
    ids=str,
)


@CASES
def test_plain(monkeypatch, step, divisor, dtype):
    monkeypatch.setattr(op, "PIECE", 1000)
    check("cpu", step, divisor, dtype)


@CASES
def test_triton(triton_device, step, divisor, dtype):
    if triton_device == "cpu" and dtype == torch.bfloat16:
        dtype = torch.float16  # the interpreter has no bf16
    check(triton_device, step, divisor, dtype)


def test_the_definition_is_pytorchs():
    master, gradient, _, _ = inputs()
    parameter = torch.nn.Parameter(master.double())
    optimizer = torch.optim.AdamW([parameter], **SETTINGS)
    state = [master.double(), torch.zeros_like(parameter), torch.zeros_like(parameter)]
    for step in range(1, 6):
        parameter.grad = gradient.double() * step
        optimizer.step()
        state = list(reference.adamw(state[0], parameter.grad, *state[1:], **SETTINGS, step=step))
    torch.testing.assert_close(state[0], parameter.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("divisor", [float("nan"), float("inf")])
def test_a_divisor_that_is_not_finite_changes_nothing(triton_device, divisor):
    for backend in ("triton", "torch"):
        tensors = inputs(triton_device)
        tensors[1][:5] = float("nan")
        copy = torch.zeros_like(tensors[0], dtype=torch.float16)
        before = [x.clone() for x in (*tensors, copy)]
        with kernels.dispatch.backend(backend):
            kernels.adamw_(*tensors, **SETTINGS, step=3, divisor=torch.tensor(divisor, device=triton_device), copy=copy)
        for found, was in zip((*tensors, copy), before, strict=True):
            torch.testing.assert_close(found, was, rtol=0, atol=0, equal_nan=True)


def test_nothing_to_update(triton_device):
    kernels.adamw_(*inputs(triton_device, elements=0), **SETTINGS, step=1)


@pytest.mark.gpu
def test_more_elements_than_32_bits_count(cuda):
    elements = 2**31 + 5  # 8 GiB a tensor
    tensors = [torch.full((elements,), value, device=cuda) for value in (1.0, 1e-3, 0.0, 0.0)]
    copy = torch.zeros(elements, dtype=torch.bfloat16, device=cuda)
    kernels.adamw_(*tensors, **SETTINGS, step=1, copy=copy)
    for tensor in (tensors[0], *tensors[2:], copy):
        assert tensor[0] == tensor[-1]
        assert (tensor == tensor[0]).all()
    assert tensors[0][0].item() == pytest.approx(1 - 1e-3 - 1e-2, abs=1e-6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"gradient": torch.zeros(3)}, r"gradient.shape=\(3,\).* master's shape \(4,\)"),
        ({"first": torch.zeros(8)[::2]}, r"first.shape=\(4,\), strides \(2,\): it must be contiguous"),
        ({"second": torch.zeros(4, dtype=torch.bfloat16)}, "second.dtype=torch.bfloat16 must be float32"),
        ({"copy": torch.zeros(5)}, r"copy.shape=\(5,\)"),
        ({"divisor": torch.ones(2)}, r"divisor.shape=\(2,\).* must be one float32"),
    ],
    ids=["gradient", "first", "second", "copy", "divisor"],
)
def test_bad_input(changed, message):
    tensors = dict(zip(("master", "gradient", "first", "second"), inputs(elements=4), strict=True)) | changed
    with pytest.raises(ValueError, match=message):
        kernels.adamw_(**tensors, **SETTINGS, step=1)
