"""The check at start compiles the kernels that a training step launches, and no other form of them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.lightning.sequences import few_positions, plan_segment
from kernels.self_check import self_check
from megatron_tn.config import DataConfig, ModelConfig
from megatron_tn.model import check
from megatron_tn.model.registry import build_model
from tests.helpers.models import tiny_config

# Heads whose decay rates are aligned in every layer.
MODEL = ModelConfig(name="tiny", vocab_size=512, embed_dim=128, layers=2, heads=4, glu_dim=160, init_std=0.05)
TRANSFORMER = replace(
    MODEL, name="transformer", architecture="transformer", norm="rmsnorm", glu_act="silu", scale_embedding=False
)
BATCH, LENGTH = 4, 128


def form(value: Any, constant: bool) -> Any:
    """What Triton compiles a kernel for: a constant's value, an integer's and an address's divisibility."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int) and not constant:
        return value if value == 1 else value % 16 == 0
    return tuple(value.block_shape) if hasattr(value, "block_shape") else None if isinstance(value, float) else value


@pytest.fixture
def launched(triton_device, monkeypatch) -> set[tuple]:
    """Kernel and form of each launch, which does nothing else."""
    from triton.runtime.interpreter import GridExecutor

    found = set()

    def note(self, *args, **kwargs):
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        constants = {name for name, kind in self.fn.__annotations__.items() if "constexpr" in str(kind)}
        forms = ((name, form(value, name in constants)) for name, value in sorted(given.items()))
        found.add((self.fn.__module__, self.fn.__name__, *forms))

    monkeypatch.setattr(GridExecutor, "__call__", note)
    return found


@pytest.mark.parametrize(
    ("model", "packed"), [(MODEL, False), (MODEL, True), (TRANSFORMER, False)], ids=["rows", "documents", "transformer"]
)
@pytest.mark.parametrize("triton_device", ["interpreter"], indirect=True)
def test_a_step_launches_only_kernels_that_were_checked(launched, monkeypatch, model, packed):
    asked = []
    monkeypatch.setattr(check, "self_check", lambda sizes, **how: asked.append((sizes, how)))
    built = build_model(model, None, "cpu", torch.float32)
    data = DataConfig(sequence_length=LENGTH, global_batch=BATCH, micro_batch=BATCH, isolate_documents=packed)
    run = tiny_config(model=model, data=data)
    check.check_kernels(built, torch.device("cuda", 0), torch.float32, run)

    def call(check, *_) -> float:
        inputs = [torch.randn(shape).requires_grad_() for shape in check.shapes]
        out = check.function(*inputs)
        if check.differentiable:
            torch.autograd.grad(out, inputs, out.detach())
        return 0.0

    monkeypatch.setattr("kernels.comparison._worst_error", call)
    for sizes, how in asked:
        self_check(replace(sizes, device=torch.device("cpu")), **how)
    checked = launched.copy()
    launched.clear()
    tokens = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) % 512
    bounds = None
    if packed:
        tokens, bounds = tokens.view(1, -1), torch.tensor([0, 100, 128, 200, 300, 512, 512, 512], dtype=torch.int32)
    built(tokens, targets=tokens, cu_seqlens=bounds).loss.backward()
    assert len(launched) > 12
    assert not launched - checked, launched - checked


@pytest.mark.parametrize("heads", [4, 32, 64])
@pytest.mark.parametrize(
    ("rows", "total"), [(1, 67), (1, 4097), (8, 2048), (1, 16384), (4, 8192), (2, 30_001), (48, 2000), (1, 500_000)]
)
def test_few_positions_are_cut_and_aligned_as_many(rows, total, heads):
    sizes = {"capability": 9, "element_bytes": 2, "heads": heads, "key": 128, "value": 128}
    fewer, length = few_positions(rows, total, **sizes)
    assert fewer <= rows
    assert fewer * length <= 4096 + 32 * 128
    assert length == total or (length - total) % 128 == 0
    cut = [plan_segment(rows=n, total=t, **sizes) < t for n, t in ((fewer, length), (rows, total))]
    assert cut[0] == cut[1]
    assert (fewer == 1) <= (rows == 1 or cut[1])
