"""Causal attention in its forms, against softmax(q k^T / sqrt(d)) v written out in fp64."""

import math

import pytest
import torch
from torch import Tensor

from megatron_tn.model.softmax_attention import causal_attention

BOUNDS = [0, 1, 9, 9, 40, 40]  # two documents are empty


def definition(q: Tensor, k: Tensor, v: Tensor, bounds: list[int] | None = None) -> Tensor:
    """[B, n, H, d], key by key: row t of n sees the first t - n + keys."""
    n, t = q.shape[1], k.shape[1]
    rows = []
    for at in range(t - n, t):
        begin = 0 if bounds is None else max(bound for bound in bounds if bound <= at)
        seen = slice(begin, at + 1)
        scores = torch.einsum("bhd,bshd->bhs", q[:, at - t + n], k[:, seen]) / math.sqrt(q.shape[-1])
        rows.append(torch.einsum("bhs,bshd->bhd", scores.softmax(-1), v[:, seen]))
    return torch.stack(rows, dim=1)


def check(queries: int, bounds: list[int] | None, dtype: torch.dtype, device: str, tolerance: float, width=16) -> None:
    draw = torch.Generator().manual_seed(0)
    batch = 2 if bounds is None else 1
    shapes = [(batch, length, 3, width) for length in (queries, 40, 40, queries)]
    q, k, v, dy = (torch.randn(shape, generator=draw, dtype=torch.float64).to(device, dtype) for shape in shapes)
    inputs = [part.requires_grad_() for part in (q, k, v)]
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=device)
    y = causal_attention(*inputs, cu_seqlens)
    exact = [part.detach().double().cpu().requires_grad_() for part in inputs]
    wanted = definition(*exact, bounds)
    found = [y, *torch.autograd.grad(y, inputs, dy)]
    expected = [wanted, *torch.autograd.grad(wanted, exact, dy.double().cpu())]
    assert y.dtype == dtype
    for name, one, other in zip(("y", "dq", "dk", "dv"), found, expected, strict=True):
        assert (one.double().cpu() - other).norm() <= tolerance * other.norm(), name


FORMS = pytest.mark.parametrize(
    ("queries", "bounds"),
    [(40, None), (7, None), (1, None), (40, BOUNDS)],
    ids=["all", "after a state", "one token", "packed"],
)


@FORMS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_attention_is_the_definition(queries, bounds, dtype):
    check(queries, bounds, dtype, "cpu", 1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.gpu
@FORMS
@pytest.mark.parametrize("width", [16, 128, 20], ids=["16", "128", "a width FlashAttention lacks"])
def test_attention_in_bf16_on_a_gpu_is_the_definition(queries, bounds, width):
    check(queries, bounds, torch.bfloat16, "cuda", 1e-2, width)


@pytest.mark.gpu
def test_packed_documents_do_not_leak_on_a_gpu():
    bounds = torch.tensor([0, 700, 1500, 4096, 4096], dtype=torch.int32, device="cuda")
    q, k, v = torch.randn(3, 1, 4096, 4, 128, device="cuda", dtype=torch.bfloat16)
    before = causal_attention(q, k, v, bounds)
    for part in (q, k, v):
        part[:, 700:1500] += 1
    after = causal_attention(q, k, v, bounds)
    changed = (before != after).flatten(2).any(-1)[0]
    assert not changed[:700].any()
    assert not changed[1500:].any()
    assert changed[700:1500].all()
