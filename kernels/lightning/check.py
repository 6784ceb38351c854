"""Argument checks of lightning attention: each error names the argument, its value and the relation it breaks."""

import itertools

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_inputs(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    """Raise ValueError unless the arguments of `lightning_attention` fit together. Checks only shapes and types."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name}.shape={tuple(x.shape)} must have four dimensions [B, T, H, width]")
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k, v have types {q.dtype}, {k.dtype}, {v.dtype}; they must be the same, one of {DTYPES}")
    if k.shape != q.shape:
        raise ValueError(f"k.shape={tuple(k.shape)} must equal q.shape={tuple(q.shape)}")
    if v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v.shape={tuple(v.shape)} must equal q.shape={tuple(q.shape)} but for the last dimension")
    check_devices(q, k=k, v=v)
    _, total, heads, width = q.shape
    if total < 1:
        raise ValueError(f"q.shape={tuple(q.shape)}: the length T={total} must be at least 1")
    check_decay_and_states(q, decay, heads, initial_state, cu_seqlens, state_widths=(width, v.shape[3]))


def check_decay_and_states(
    x: Tensor,
    decay: Tensor,
    heads: int,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    state_widths: tuple[int, int],
) -> None:
    """Raise ValueError unless decay, initial_state and cu_seqlens fit x [B, T, ...]. Checks only shapes and types."""
    check_devices(x, decay=decay, initial_state=initial_state, cu_seqlens=cu_seqlens)
    if decay.shape != (heads,):
        raise ValueError(f"decay.shape={tuple(decay.shape)} must be [H] = ({heads},)")
    _check_wide_type("decay", decay)
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, x)
    if initial_state is not None:
        rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        expected = (rows, heads, *state_widths)
        if initial_state.shape != expected:
            raise ValueError(f"initial_state.shape={tuple(initial_state.shape)} must be {tuple(expected)}")
        _check_wide_type("initial_state", initial_state)


def check_devices(x: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError unless `others` are on x's device type."""
    for name, other in others.items():
        if other is not None and other.device.type != x.device.type:
            raise ValueError(f"{name}.device={other.device} must be that of the other inputs, {x.device}")


def check_values(decay: Tensor, cu_seqlens: Tensor | None, total: int) -> None:
    """Raise ValueError unless rates are finite and >= 0 and cu_seqlens rises from 0 to `total`. Reads tensor values, so
    only for CPU tensors."""
    if not bool(((decay >= 0) & decay.isfinite()).all()):
        # An infinite rate would make exp(-r (t - s)) NaN at t = s.
        raise ValueError(f"decay={decay.tolist()} must be >= 0 and finite at every head")
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != total or any(a > b for a, b in itertools.pairwise(bounds)):
            raise ValueError(f"cu_seqlens={bounds} must rise from 0 to T={total}")


def _check_cu_seqlens(cu_seqlens: Tensor, x: Tensor) -> None:
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens.shape={tuple(cu_seqlens.shape)} must be [n + 1] with n >= 1 documents")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens.dtype={cu_seqlens.dtype} must be int32 (int64 is taken too)")
    if x.shape[0] != 1:
        raise ValueError(f"B={x.shape[0]}: with cu_seqlens the documents share one row, so B must be 1")


def _check_wide_type(name: str, x: Tensor) -> None:
    # A rate r rounded to bf16 is off by up to 0.4 %, and exp(-r n) by r n times as much.
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name}.dtype={x.dtype} must be float32 (float64 is taken too)")
