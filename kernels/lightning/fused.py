"""The fused projection q | k | v | u: its parts, and which implementation takes it."""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels import dispatch
from kernels.lightning.op import MAX_TRITON_WIDTH

MAX_TRITON_LRPE_WIDTH = 128
MAX_TRITON_ROW = 65536

# Given the gradient of the initial state, as far as the output reaches it, returns what to call for that of the final
# state: a slice of a sequence sends the one to the slices before it and gets the other from those after it.
Exchange = Callable[[Tensor], Callable[[], Tensor]]


def parts(qkvu: Tensor, heads: int) -> tuple[Tensor, ...]:
    """q, k, v, u: views [B, T, H, d] of [B, T, 4 H d]."""
    batch, total, fused = qkvu.shape
    return qkvu.view(batch, total, 4, heads, fused // 4 // heads).unbind(2)


def document_positions(cu_seqlens: Tensor, total: int) -> Tensor:
    """[total], every document's counted from 0."""
    place = torch.arange(total, device=cu_seqlens.device)
    bounds = cu_seqlens.to(place.dtype)
    return place - bounds[torch.searchsorted(bounds, place, right=True) - 1]


def backend(v: Tensor, theta: Tensor | None) -> str:
    """Which implementation runs for v [B, T, H, d]."""
    width, unsupported = v.shape[-1], None
    limit = MAX_TRITON_WIDTH if theta is None else MAX_TRITON_LRPE_WIDTH
    if v.dtype == torch.float64:
        unsupported = "tensor cores' fp32 sums cannot serve float64 inputs"
    elif width > limit:
        unsupported = f"the width {width} exceeds {limit}{'' if theta is None else ', the most that LRPE may double'}"
    elif width * v.shape[2] > MAX_TRITON_ROW:
        unsupported = f"H d = {width * v.shape[2]} exceeds {MAX_TRITON_ROW}"
    return dispatch.choose("gla", v, unsupported)
