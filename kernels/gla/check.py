"""Argument checks of gated linear attention: each error names the argument, its value and the relation it breaks."""

import torch
from torch import Tensor

from kernels.activations.plain import NAMES
from kernels.lightning.check import DTYPES, check_decay_and_states, check_devices, check_values
from kernels.numerics import accumulation_dtype


def check_gla(
    *,
    qkvu: Tensor,
    decay: Tensor,
    theta: Tensor | None,
    act: str,
    positions: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raise ValueError unless the arguments of `gla` fit together. Checks only shapes and types."""
    if qkvu.dim() != 3 or qkvu.dtype not in DTYPES or qkvu.stride(-1) != 1:
        raise ValueError(
            f"qkvu.shape={tuple(qkvu.shape)}, strides {qkvu.stride()}, {qkvu.dtype} must be [B, T, 4 H d], its last "
            f"dimension contiguous, of a type in {DTYPES}"
        )
    batch, total, fused = qkvu.shape
    if decay.dim() != 1 or decay.shape[0] == 0 or fused % (4 * decay.shape[0]):
        raise ValueError(f"qkvu.shape[2]={fused} must be 4 H d with H from decay.shape={tuple(decay.shape)} = [H]")
    heads, width = decay.shape[0], fused // 4 // decay.shape[0]
    if act not in NAMES:
        raise ValueError(f"act={act!r} is not one of the activations {NAMES}")
    check_devices(qkvu, theta=theta, positions=positions)
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
    check_decay_and_states(qkvu, decay, heads, initial_state, cu_seqlens, state_widths=(key, width))


def check_update(qkvu: Tensor, initial_state: Tensor | None, one_token: bool) -> None:
    """Raise ValueError unless `gla` can write the final state over initial_state."""
    if not one_token:
        raise ValueError(
            f"update_state=True needs one token, an initial state, no cu_seqlens and no gradients, got "
            f"qkvu.shape={tuple(qkvu.shape)}"
        )
    if initial_state.dtype != accumulation_dtype(qkvu.dtype) or not initial_state.is_contiguous():
        raise ValueError(
            f"initial_state, {initial_state.dtype} with strides {initial_state.stride()}, must be contiguous and "
            f"{accumulation_dtype(qkvu.dtype)} for update_state=True"
        )


def check_gla_values(decay: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None, total: int) -> None:
    """Raise ValueError unless `check_values` passes and positions rise by 1 within every row or document. Reads tensor
    values, so only for CPU tensors."""
    check_values(decay, cu_seqlens, total)
    if positions is None or total == 1:
        return
    steps = positions.diff(dim=-1) == 1
    if cu_seqlens is not None:
        starts = cu_seqlens[(cu_seqlens > 0) & (cu_seqlens < total)].long()
        steps = steps.index_fill(-1, starts - 1, True)
    if not bool(steps.all()):
        index = (~steps).nonzero()[0].tolist()
        raise ValueError(f"positions must rise by 1 within a row or document, and do not after index {index}")
