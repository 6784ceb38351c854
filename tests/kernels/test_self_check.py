"""The check at start: passes on right kernels, catches each one broken on purpose, and falls back."""

import importlib
import inspect
import logging

import pytest
import torch
from torch.utils._pytree import tree_leaves

import kernels
from kernels import dispatch
from kernels.comparison import KernelMismatchError
from kernels.decoding_check import decoding_check
from kernels.self_check import StepSizes, self_check

SHAPES = {"heads": 2, "key_width": 16, "value_width": 24, "glu_width": 40, "embed_width": 48, "length": 67}


def check(device: str, dtype=torch.float32, unused=(), fall_back=False, order=0, **changes) -> dict[str, float]:
    sizes = StepSizes(**{**SHAPES, "dtype": dtype, "device": torch.device(device)} | changes)
    return self_check(sizes, unused=unused, fall_back=fall_back, order=order)


@pytest.fixture(autouse=True)
def few_tiles(monkeypatch):
    """Whole tiles and a part of one, of the head and of symmetric products, where there is no GPU: the interpreter is
    slow."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(inspect.getmodule(self_check), "VOCABULARY", 512)
        monkeypatch.setattr(importlib.import_module("kernels.newton_schulz.op"), "LEAST_ROWS", 128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_plain_pytorch_passes(dtype):
    norms = ["simple_rms_norm", "add_simple_rms_norm", "add_scaled_simple_rms_norm", "rms_norm", "add_rms_norm"]
    others = ["sglu", "scaled_embedding", "scaled_embedding_sum", "linear_cross_entropy", "muon_", "adamw_"]
    if dtype != torch.float32:
        others.insert(-1, "gram_polynomial")
    names = ["lightning_attention", "gla", "gla_theta", *norms, *others]
    assert list(check("cpu", dtype, key_width=48)) == names
    plain = [name for name in names if name != "gla_theta"]
    assert (
        list(check("cpu", dtype))
        == list(check("cpu", dtype, packed=True))
        == list(check("cpu", dtype, batch=3))
        == plain
    )
    assert list(check("cpu", dtype, rope_base=1e4, glu_act="silu")) == ["rope", *norms, *others]
    float8 = check("cpu", dtype, rope_base=1e4, float8=True).keys() - {"rope", *norms, *others}
    assert float8 == {"quantize_48", "quantize_40", "quantize_many", "sglu_pair"}


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.full)], ids=str)
def test_the_kernels_pass(triton_device, dtype):
    if dtype == torch.float32 and triton_device == "cpu":
        check(triton_device, dtype, key_width=48)
    else:  # the head, which comes last, has no kernel for these types
        with pytest.raises(ValueError, match="cannot run linear_cross_entropy"):
            check(triton_device, dtype, key_width=48)


@pytest.mark.gpu
@pytest.mark.parametrize("embed_width", [64, 4096])
def test_the_kernels_pass_in_bf16_on_the_gpu(cuda, embed_width):
    float8 = torch.cuda.get_device_capability()[0] >= 9
    check(cuda, torch.bfloat16, key_width=48, embed_width=embed_width, float8=float8)


@pytest.fixture
def one_operator(monkeypatch):
    """Call it with the name of an operator: self_check then checks that one alone."""
    module = inspect.getmodule(self_check)
    checks = module._checks

    def choose(operator: str) -> None:
        monkeypatch.setattr(module, "_checks", lambda sizes: (c for c in checks(sizes) if c.operator == operator))

    return choose


def break_output(monkeypatch, module: str, function: str, wrong) -> None:
    """Let `module`.`function` return its results, the first of them changed by `wrong`, but for fp64."""
    found = importlib.import_module(module)
    right = getattr(found, function)

    def broken(*args, **settings):
        result = right(*args, **settings)
        if any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in tree_leaves((args, settings))):
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
        ("kernels.gla.plain", "forward", "gla"),
        ("kernels.srmsnorm.op", "_plain_backward", "simple_rms_norm"),
        ("kernels.cross_entropy.op", "head_exponentials", "linear_cross_entropy"),
    ],
    ids=lambda p: p if isinstance(p, str) else p.__name__,
)
def test_a_broken_operator_is_named(monkeypatch, one_operator, module, function, operator, wrong):
    one_operator(operator)
    break_output(monkeypatch, module, function, wrong)
    with pytest.raises(KernelMismatchError, match=f"{operator} at .* is off by .* more than 1e-04"):
        check("cpu")


@pytest.mark.parametrize("order", range(4))
def test_the_same_error_is_named_in_each_order_of_the_checks(monkeypatch, order):
    names = list(check("cpu"))
    wrong, checked = {names[4], names[9]}, []

    def error_of(check, *_) -> float:
        checked.append(check.operator)
        return float("nan") if check.operator in wrong else 0.0

    monkeypatch.setattr("kernels.comparison._worst_error", error_of)
    with pytest.raises(KernelMismatchError, match=f"^{names[4]} at "):
        check("cpu", order=order)
    assert set(names[:5]) <= set(checked)
    wrong.clear()
    checked.clear()
    assert list(check("cpu", order=order, unused=names[:2])) == names[2:]
    assert sorted(checked) == sorted(names[2:])
    assert (checked == names[2:]) == (order == 0)
    assert (checked[::-1] == names[2:]) == (order == 1)


def off_scale(right):
    return lambda total, *, scale, **others: right(total, scale=1.01 * scale, **others)


def off_step(right):
    return lambda *, step, **others: right(step=step + 1, **others)


def off_beta(right):
    return lambda out, momentum, gradient, beta, divisor: right(out, momentum, gradient, beta - 0.01, divisor)


@pytest.mark.parametrize(
    ("module", "function", "operator"),
    [
        ("kernels.lightning.passes", "forward", "lightning_attention"),
        ("kernels.lightning.passes", "backward", "lightning_attention"),
        ("kernels.gla.triton_gate", "gate", "gla"),
        ("kernels.srmsnorm.triton_norm", "backward", "simple_rms_norm"),
        ("kernels.srmsnorm.triton_norm", "scaled_backward", "add_scaled_simple_rms_norm"),
        ("kernels.sglu.triton_sglu", "backward", "sglu"),
        ("kernels.rope.triton_rope", "rotate_heads", "rope"),
        ("kernels.rmsnorm.triton_rmsnorm", "backward", "rms_norm"),
        ("kernels.rmsnorm.triton_rmsnorm", "backward", "add_rms_norm"),
        ("kernels.embedding.triton_embedding", "forward", "scaled_embedding"),
        ("kernels.embedding.triton_embedding", "add_gradient_", "scaled_embedding_sum"),
        ("kernels.cross_entropy.exponentials", "exponentials", "linear_cross_entropy"),
        ("kernels.muon.triton_muon", "direction_", "muon_"),
        ("kernels.adamw.triton_adamw", "update_", "adamw_"),
    ],
)
def test_a_broken_kernel_is_named(triton_device, monkeypatch, one_operator, module, function, operator):
    if operator == "linear_cross_entropy" and triton_device == "cuda":
        pytest.skip("the head has no kernel for fp32 on a GPU")
    one_operator(operator)
    changed_argument = {"add_gradient_": off_scale, "direction_": off_beta, "update_": off_step}.get(function)
    if changed_argument is None:
        break_output(monkeypatch, module, function, off_by_a_hundredth)
    else:  # writes its result in place
        found = importlib.import_module(module)
        monkeypatch.setattr(found, function, changed_argument(getattr(found, function)))
    with pytest.raises(KernelMismatchError, match=f"^{operator} at "):
        check(triton_device, rope_base=1e4 if operator == "rope" else None)


def test_a_broken_symmetric_product_is_named(triton_device, monkeypatch, one_operator):
    one_operator("gram_polynomial")
    break_output(monkeypatch, "kernels.newton_schulz.triton_symmetric", "symmetric_product", off_by_a_hundredth)
    with pytest.raises(KernelMismatchError, match=r"^gram_polynomial at "):
        check(triton_device, torch.float16)


def test_a_broken_kernel_makes_all_fall_back(triton_device, monkeypatch, caplog):
    break_output(monkeypatch, "kernels.lightning.passes", "forward", off_by_a_hundredth)
    with caplog.at_level(logging.ERROR, logger="kernels.comparison"):
        errors = check(triton_device, fall_back=True)
    assert list(errors)[-1] == "adamw_"  # all operators were checked again
    assert "lightning_attention at" in caplog.text
    assert "run in PyTorch from here on" in caplog.text
    assert dispatch.requested_backend() == "torch"
    x = torch.ones(1, 4, device=triton_device)
    assert torch.allclose(kernels.simple_rms_norm(x), x)


# Decoding


def check_decoding(device: str, dtype=torch.float32, key_width: int = 48, **changes) -> dict[str, float]:
    sizes = {"heads": 2, "key_width": key_width, "value_width": 24, "glu_width": 40, "embed_width": 64}
    return decoding_check(**{**sizes, "dtype": dtype, "device": torch.device(device)} | changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_decoding_in_plain_pytorch_passes(dtype):
    operators = ["gla_step_", "gla_step_buffered_", "token_linear", "token_glu", "sample_tokens"]
    assert list(check_decoding("cpu", dtype)) == operators
    operators[4:4] = ["float8_linear", "token_glu of fp8 weights"]
    assert list(check_decoding("cpu", dtype, linear=False, float8=True)) == operators[2:]


@pytest.mark.parametrize("key_width", [24, 48], ids=["plain", "lrpe"])
def test_the_kernels_of_decoding_pass(triton_device, monkeypatch, key_width):
    if triton_device == "cpu":
        monkeypatch.setattr(inspect.getmodule(decoding_check), "DRAWS", 6)
    check_decoding(triton_device, key_width=key_width, glu_act="silu", float8=key_width == 48)


@pytest.mark.gpu
def test_the_kernels_of_decoding_pass_in_bf16_on_the_gpu(cuda):
    sizes = {"heads": 16, "key_width": 256, "value_width": 128, "glu_width": 5504, "embed_width": 2048}
    check_decoding(cuda, torch.bfloat16, **sizes, float8=True)


@pytest.mark.parametrize(
    ("module", "function", "operator"),
    [
        ("kernels.gla.triton_step", "step", "gla_step_"),
        ("kernels.gla.triton_buffered", "step", "gla_step_buffered_"),
        ("kernels.token.triton_token", "linear", "token_linear"),
        ("kernels.token.triton_token", "glu", "token_glu"),
        ("kernels.float8_linear.triton_float8", "linear", "float8_linear"),
        ("kernels.sampling.triton_sampling", "sample", "sample_tokens"),
    ],
)
def test_a_broken_kernel_of_decoding_is_named(triton_device, monkeypatch, module, function, operator):
    checks = inspect.getmodule(decoding_check)
    compare = checks.compare
    monkeypatch.setattr(
        checks, "compare", lambda all_, *more: compare(lambda: (c for c in all_() if c.operator == operator), *more)
    )
    monkeypatch.setattr(checks, "DRAWS", 6 if triton_device == "cpu" else 64)
    if operator == "sample_tokens":  # it has arguments in fp64
        found = importlib.import_module(module)
        right = found.sample
        monkeypatch.setattr(found, function, lambda **given: (right(**given) - 1).clamp_(min=0))
    else:
        break_output(monkeypatch, module, function, off_by_a_hundredth)
    with pytest.raises(KernelMismatchError, match=f"^{operator} at "):
        check_decoding(triton_device, float8=True)


def test_the_random_state_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    check("cpu")
    assert torch.equal(torch.rand(4), expected)
