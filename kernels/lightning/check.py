"""What lightning attention asks of its arguments, each refusal naming the argument and the relation it breaks."""

import itertools

import torch
from torch import Tensor

from kernels.lightning.activations import ACTIVATIONS

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
    _check_devices(q, k=k, v=v)
    _, total, heads, width = q.shape
    if total < 1:
        raise ValueError(f"q.shape={tuple(q.shape)}: the length T={total} must be at least 1")
    _check_rest(q, decay, heads, initial_state, cu_seqlens, (width, v.shape[3]))


def check_gla(
    qkvu: Tensor,
    decay: Tensor,
    theta: Tensor | None,
    act: str,
    positions: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raise ValueError unless the arguments of `gla` fit together. Looks at shapes and types alone."""
    if qkvu.dim() != 3 or qkvu.dtype not in DTYPES or qkvu.stride(-1) != 1:
        raise ValueError(
            f"qkvu.shape={tuple(qkvu.shape)}, strides {qkvu.stride()}, {qkvu.dtype} must be [B, T, 4 H d], its last "
            f"dimension contiguous, of a type in {DTYPES}"
        )
    batch, total, fused = qkvu.shape
    if decay.dim() != 1 or decay.shape[0] == 0 or fused % (4 * decay.shape[0]):
        raise ValueError(f"qkvu.shape[2]={fused} must be 4 H d with H from decay.shape={tuple(decay.shape)} = [H]")
    heads, width = decay.shape[0], fused // 4 // decay.shape[0]
    if act not in ACTIVATIONS:
        raise ValueError(f"act={act!r} is not one of the activations {sorted(ACTIVATIONS)}")
    _check_devices(qkvu, theta=theta, positions=positions)
    if theta is not None and theta.shape != (heads, 1, width):
        raise ValueError(f"theta.shape={tuple(theta.shape)} must be [H, 1, d] = {(heads, 1, width)}")
    if positions is not None:
        if positions.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"positions.dtype={positions.dtype} must be int32 or int64: floats lose long positions")
        if positions.shape not in ((total,), (batch, total)):
            raise ValueError(f"positions.shape={tuple(positions.shape)} must be [T] = {(total,)} or [B, T]")
    if total < 1:
        raise ValueError(f"qkvu.shape={tuple(qkvu.shape)}: the length T={total} must be at least 1")
    key = width if theta is None else 2 * width
    _check_rest(qkvu, decay, heads, initial_state, cu_seqlens, (key, width))


def check_positions(positions: Tensor | None, cu_seqlens: Tensor | None, total: int) -> None:
    """Raise ValueError unless positions rise by 1 within every row or document. Reads values: CPU only."""
    if positions is None or total == 1:
        return
    steps = positions.diff(dim=-1) == 1
    if cu_seqlens is not None:
        starts = cu_seqlens[(cu_seqlens > 0) & (cu_seqlens < total)].long()
        steps = steps.index_fill(-1, starts - 1, True)
    if not bool(steps.all()):
        index = (~steps).nonzero()[0].tolist()
        raise ValueError(f"positions must rise by 1 within a row or document, and do not after index {index}")


def check_features(
    features: Tensor | None, qkvu: Tensor, heads: int, with_lrpe: bool, positions: Tensor | None, positions_matter: bool
) -> None:
    """Raise ValueError unless features formed ahead, empty where none are kept, are of this qkvu; and where they were
    formed without the positions that a state of packed documents counts in."""
    if features is None:
        return
    batch, total, fused = qkvu.shape
    expected = (batch, total, 2, heads, fused // 4 // heads * (2 if with_lrpe else 1))
    if features.dtype != qkvu.dtype or (features.numel() and features.shape != expected):
        raise ValueError(
            f"features is {tuple(features.shape)} {features.dtype}; of this qkvu they are {expected} {qkvu.dtype}"
        )
    if positions_matter and positions is None:
        raise ValueError(
            "positions=None: where cu_seqlens packs documents, features formed ahead and a state must be given theirs"
        )


def check_values(decay: Tensor, cu_seqlens: Tensor | None, total: int) -> None:
    """Raise ValueError unless the rates are finite and >= 0 and cu_seqlens rises from 0 to `total`. Reads values: CPU
    only."""
    if not bool(((decay >= 0) & decay.isfinite()).all()):
        # Of an infinite rate not even the position itself would be left: exp(-inf * 0) is NaN.
        raise ValueError(f"decay={decay.tolist()} must be >= 0 and finite at every head")
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != total or any(a > b for a, b in itertools.pairwise(bounds)):
            raise ValueError(f"cu_seqlens={bounds} must rise from 0 to T={total}")


def _check_rest(
    x: Tensor,
    decay: Tensor,
    heads: int,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    widths: tuple[int, int],
) -> None:
    """x: [B, T, ...], on the inputs' device. widths: of a state."""
    _check_devices(x, decay=decay, initial_state=initial_state, cu_seqlens=cu_seqlens)
    _check_decay(decay, heads)
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, x)
    if initial_state is not None:
        rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        expected = (rows, heads, *widths)
        if initial_state.shape != expected:
            raise ValueError(f"initial_state.shape={tuple(initial_state.shape)} must be {tuple(expected)}")
        _check_wide_type("initial_state", initial_state)


def _check_devices(x: Tensor, **others: Tensor | None) -> None:
    for name, other in others.items():
        if other is not None and other.device.type != x.device.type:
            raise ValueError(f"{name}.device={other.device} must be that of the other inputs, {x.device}")


def _check_decay(decay: Tensor, heads: int) -> None:
    if decay.shape != (heads,):
        raise ValueError(f"decay.shape={tuple(decay.shape)} must be [H] = ({heads},)")
    _check_wide_type("decay", decay)


def _check_cu_seqlens(cu_seqlens: Tensor, q: Tensor) -> None:
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens.shape={tuple(cu_seqlens.shape)} must be [n + 1] with n >= 1 documents")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens.dtype={cu_seqlens.dtype} must be int32 (int64 is taken too)")
    if q.shape[0] != 1:
        raise ValueError(f"B={q.shape[0]}: with cu_seqlens the documents share one row, so B must be 1")


def _check_wide_type(name: str, x: Tensor) -> None:
    # bf16 rates are off by 0.4 %, which compounds at every position.
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name}.dtype={x.dtype} must be float32 (float64 is taken too)")
