"""The check at start: passes on right kernels, catches each one broken on purpose, and falls back."""

import importlib
import logging

import pytest
import torch

import kernels
from kernels import dispatch
from kernels.self_check import KernelMismatchError, self_check

SHAPES = {"heads": 2, "key_width": 16, "value_width": 24, "glu_width": 40, "length": 67}


def check(device: str, dtype=torch.float32, **changes) -> dict[str, float]:
    return self_check(**{**SHAPES, "dtype": dtype, "device": torch.device(device)} | changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_plain_pytorch_passes(dtype):
    norms = ["simple_rms_norm", "add_simple_rms_norm", "add_scaled_simple_rms_norm"]
    others = ["sglu", "scaled_embedding", "added_embedding", "linear_cross_entropy", "adamw"]
    names = ["lightning_attention", "gla", "gla_theta", *norms, *others]
    assert list(check("cpu", dtype, key_width=48)) == names
    assert list(check("cpu", dtype)) == [name for name in names if name != "gla_theta"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_kernels_pass(triton_device, dtype):
    if dtype == torch.float32 and triton_device == "cpu":
        check(triton_device, dtype, key_width=48)
    else:  # the head, which comes last, has no kernel for these types
        with pytest.raises(ValueError, match="cannot run linear_cross_entropy"):
            check(triton_device, dtype, key_width=48)


@pytest.mark.gpu
@pytest.mark.parametrize("embed_width", [64, 4096])
def test_the_kernels_pass_in_bf16_on_the_gpu(cuda, embed_width):
    check(cuda, torch.bfloat16, key_width=48, embed_width=embed_width)


def break_output(monkeypatch, module: str, function: str, wrong) -> None:
    """Let `module`.`function` return its results, the first of them changed by `wrong`, but for fp64."""
    found = importlib.import_module(module)
    right = getattr(found, function)

    def broken(*args):
        result = right(*args)
        if any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in args):
            return result  # fp64 is what the operator is judged by
        return (wrong(result[0]), *result[1:]) if isinstance(result, tuple) else wrong(result)

    monkeypatch.setattr(found, function, broken)


def off_by_a_hundredth(x):
    return x * 1.01


def with_a_nan(x):
    x.view(-1)[0] = float("nan")
    return x


@pytest.mark.parametrize("wrong", [off_by_a_hundredth, with_a_nan])
@pytest.mark.parametrize(
    ("module", "function", "operator"),
    [
        ("kernels.lightning.chunked", "forward", "lightning_attention"),
        ("kernels.lightning.chunked", "backward", "lightning_attention"),
        ("kernels.lightning.gla_plain", "forward", "gla"),
        ("kernels.srmsnorm.op", "_plain_backward", "simple_rms_norm"),
        ("kernels.cross_entropy.op", "head_exponentials", "linear_cross_entropy"),
    ],
    ids=lambda p: p if isinstance(p, str) else p.__name__,
)
def test_a_broken_operator_is_named(monkeypatch, module, function, operator, wrong):
    break_output(monkeypatch, module, function, wrong)
    with pytest.raises(KernelMismatchError, match=f"{operator} at .* is off by .* more than 1e-04"):
        check("cpu")


@pytest.mark.parametrize(
    ("module", "function"),
    [
        ("kernels.lightning.launch", "forward"),
        ("kernels.lightning.launch", "backward"),
        ("kernels.lightning.triton_gate", "gate"),
        ("kernels.srmsnorm.triton_norm", "backward"),
        ("kernels.srmsnorm.triton_norm", "add_scaled_backward"),
        ("kernels.sglu.triton_sglu", "backward"),
        ("kernels.embedding.triton_embedding", "forward"),
        ("kernels.cross_entropy.triton_head", "exponentials"),
    ],
)
def test_a_broken_kernel_makes_all_fall_back(triton_device, monkeypatch, caplog, module, function):
    if module == "kernels.cross_entropy.triton_head" and triton_device == "cuda":
        pytest.skip("the head has no kernel for fp32 on a GPU")
    break_output(monkeypatch, module, function, off_by_a_hundredth)
    with pytest.raises(KernelMismatchError):
        check(triton_device)
    with caplog.at_level(logging.ERROR, logger="kernels.self_check"):
        check(triton_device, fall_back=True)
    assert "run in PyTorch from here on" in caplog.text
    assert dispatch.requested_backend() == "torch"
    x = torch.ones(1, 4, device=triton_device)
    assert torch.allclose(kernels.simple_rms_norm(x), x)


def test_the_random_state_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    check("cpu")
    assert torch.equal(torch.rand(4), expected)


def test_a_sum_that_is_off_is_named(triton_device, monkeypatch):
    triton_embedding = importlib.import_module("kernels.embedding.triton_embedding")
    right = triton_embedding.add_gradient_

    def off(total, dy, ids, scale, row_start):
        right(total, dy, ids, 1.01 * scale, row_start)

    monkeypatch.setattr(triton_embedding, "add_gradient_", off)
    with pytest.raises(KernelMismatchError, match=r"added_embedding at .* is off by 1.0e-02"):
        check(triton_device, torch.bfloat16 if triton_device == "cuda" else torch.float32)


def test_an_update_that_is_off_is_named(triton_device, monkeypatch):
    triton_adamw = importlib.import_module("kernels.adamw.triton_adamw")
    right = triton_adamw.update_

    def off(*tensors, step, **settings):
        right(*tensors, step=step + 1, **settings)

    monkeypatch.setattr(triton_adamw, "update_", off)
    with pytest.raises(KernelMismatchError, match=r"adamw at .* more than 1e-06"):
        check(triton_device, torch.bfloat16 if triton_device == "cuda" else torch.float32)
