"""What lightning attention asks of its arguments, each refusal naming the argument and the relation it breaks."""

import itertools

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_inputs(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    """Raise ValueError unless the arguments of `lightning_attention` fit together. Looks at shapes and types alone."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name}.shape={tuple(x.shape)} must have four dimensions [B, T, H, width]")
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k, v have types {q.dtype}, {k.dtype}, {v.dtype}; they must be the same, one of {DTYPES}")
    if k.shape != q.shape:
        raise ValueError(f"k.shape={tuple(k.shape)} must equal q.shape={tuple(q.shape)}")
    if v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v.shape={tuple(v.shape)} must equal q.shape={tuple(q.shape)} but for the last dimension")
    batch, total, heads, width = q.shape
    if total < 1:
        raise ValueError(f"q.shape={tuple(q.shape)}: the length T={total} must be at least 1")
    _check_decay(decay, heads)
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, q)
    if initial_state is not None:
        rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        expected = (rows, heads, width, v.shape[3])
        if initial_state.shape != expected:
            raise ValueError(f"initial_state.shape={tuple(initial_state.shape)} must be {tuple(expected)}")
        _check_wide_type("initial_state", initial_state)


def check_values(decay: Tensor, cu_seqlens: Tensor | None, total: int) -> None:
    """Raise ValueError unless the rates are >= 0 and cu_seqlens rises from 0 to `total`. Reads values: CPU only."""
    if not bool((decay >= 0).all()):
        raise ValueError(f"decay={decay.tolist()} must be >= 0 at every head")
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != total or any(a > b for a, b in itertools.pairwise(bounds)):
            raise ValueError(f"cu_seqlens={bounds} must rise from 0 to T={total}")


def _check_decay(decay: Tensor, heads: int) -> None:
    if decay.shape != (heads,):
        raise ValueError(f"decay.shape={tuple(decay.shape)} must be [H] = ({heads},)")
    _check_wide_type("decay", decay)


def _check_cu_seqlens(cu_seqlens: Tensor, q: Tensor) -> None:
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens.shape={tuple(cu_seqlens.shape)} must be [n + 1] with n >= 1 documents")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens.dtype={cu_seqlens.dtype} must be int32")
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens.device={cu_seqlens.device} must be that of q, {q.device}")
    if q.shape[0] != 1:
        raise ValueError(f"q.shape[0]={q.shape[0]}: with cu_seqlens the documents share one row, so B must be 1")


def _check_wide_type(name: str, x: Tensor) -> None:
    # bf16 rates are off by 0.4 %, which compounds at every position.
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name}.dtype={x.dtype} must be float32 (float64 is taken too)")
