"""Inputs and saved tensors of gated linear attention's passes, and the choice of the backend."""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels import dispatch
from kernels.lightning.inputs import AttentionInputs
from kernels.lightning.op import MAX_TRITON_WIDTH

MAX_TRITON_LRPE_WIDTH = MAX_TRITON_WIDTH // 2  # head width d; LRPE features have width 2 d
PIECE = 32  # columns of a head whose o^2 a decoding step sums together
MAX_TRITON_ROW = 65536  # H d: the gate's kernels hold a whole row


class GlaInputs(NamedTuple):
    """The arguments of `gla`, which documents them.

    qkvu: [B, T, 4 H d]. decay: [H]. theta: [H, 1, d] or None. positions: [T], [B, T] or None. initial_state:
    [B or documents, H, K, d] or None, with K = d, or 2 d with LRPE. cu_seqlens: [documents + 1] or None.
    """

    qkvu: Tensor
    decay: Tensor
    theta: Tensor | None
    act: str
    gate: bool
    positions: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None

    @property
    def heads(self) -> int:
        return self.decay.shape[0]

    @property
    def total(self) -> int:
        """T."""
        return self.qkvu.shape[1]

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, u: views [B, T, H, d]."""
        return parts(self.qkvu, self.heads)

    @property
    def backend(self) -> str:
        return backend(self.parts[2], self.theta)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> AttentionInputs:
        """The inputs of lightning attention with q and k (or their features) and v."""
        return AttentionInputs(q, k, v, self.decay, self.initial_state, self.cu_seqlens)


class Saved(NamedTuple):
    """Tensors saved by the forward pass for the backward pass.

    o: [B, T, H, d], or [B, T, H d]. starts: initial states of the segments, from lightning attention's forward pass.
    features: of q and k, [B, T, 2, H, K], empty with plain PyTorch; None where the feature map is the identity.
    state: the final state, for dtheta; None without LRPE or where it was not returned.
    """

    o: Tensor
    starts: Tensor | None
    features: Tensor | None
    state: Tensor | None


def parts(qkvu: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, u: views [B, T, H, d] of [B, T, 4 H d]."""
    batch, total, fused = qkvu.shape
    return qkvu.view(batch, total, 4, heads, fused // 4 // heads).unbind(2)


def key_width(v: Tensor, theta: Tensor | None) -> int:
    """K, the width of the features of q and k: d, or 2 d with LRPE."""
    return v.shape[-1] * (1 if theta is None else 2)


def products(qkvu_shape, decay_shape, theta_shape) -> int:
    """B T H K d, the multiplications of k_t^T v_t at every position; theta_shape None without LRPE."""
    batch, total, fused = qkvu_shape
    heads, width = decay_shape[0], fused // 4 // decay_shape[0]
    return batch * total * heads * width * width * (1 if theta_shape is None else 2)


def document_positions(cu_seqlens: Tensor, total: int) -> Tensor:
    """[total]: each token's position in its packed document, from 0."""
    place = torch.arange(total, device=cu_seqlens.device)
    bounds = cu_seqlens.to(place.dtype)
    return place - bounds[torch.searchsorted(bounds, place, right=True) - 1]


def backend(v: Tensor, theta: Tensor | None) -> str:
    """Which implementation runs for v [B, T, H, d]."""
    width, unsupported = v.shape[-1], None
    limit = MAX_TRITON_WIDTH if theta is None else MAX_TRITON_LRPE_WIDTH
    if width > limit:
        unsupported = f"the width {width} exceeds {limit}{'' if theta is None else ', the most that LRPE may double'}"
    elif width * v.shape[2] > MAX_TRITON_ROW:
        unsupported = f"H d = {width * v.shape[2]} exceeds {MAX_TRITON_ROW}"
    return dispatch.choose("gla", v, unsupported)
