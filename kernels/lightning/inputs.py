"""Inputs of lightning attention's passes."""

from typing import NamedTuple

from torch import Tensor


class AttentionInputs(NamedTuple):
    """The arguments of `lightning_attention`, which documents them.

    q, k: [B, T, H, K]. v: [B, T, H, V]. decay: [H]. initial_state: [B or documents, H, K, V] or None, for zero.
    cu_seqlens: [documents + 1], or None for rows that are whole sequences.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
