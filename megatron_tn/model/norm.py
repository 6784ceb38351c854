"""Normalisations over the embedding dimension. SimpleRMSNorm has no weights; RMSNorm is the ablation that has."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels import add_scaled_simple_rms_norm, add_simple_rms_norm, branch_simple_rms_norm
from megatron_tn.parallel.sequence import TokenSlices
from megatron_tn.parallel.sharding import ShardSpec, mark


class SimpleRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) over the last dimension, statistics in fp32 (arXiv 2307.14995, equation 12).

    It stands where a branch leaves the residual stream: x, and what the branch before it adds to x (if one does), go
    in; their sum and the normed sum come out. Sum and norm are one pass over memory, forward and backward.

    square_sum [..]: of the update before its last product, which is still to be normed by it (see
    `GatedLinearAttention`).
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps

    def forward(
        self,
        x: Tensor,
        update: Tensor | None = None,
        square_sum: Tensor | None = None,
        slices: TokenSlices | None = None,
    ) -> tuple[Tensor, Tensor]:
        if update is None:
            return branch_simple_rms_norm(x, self.eps)
        if square_sum is None:
            return add_simple_rms_norm(x, update, self.eps)
        return add_scaled_simple_rms_norm(x, update, square_sum, self.eps)


class RMSNorm(SimpleRMSNorm):
    """SimpleRMSNorm times a learnt weight [D], which every tensor-parallel rank holds whole.

    slices: the tokens are shared out over the ranks, so that each sees a part of the weight's gradient.
    """

    def __init__(self, width: int, eps: float):
        super().__init__(width, eps)
        self.weight = mark(nn.Parameter(torch.empty(width)), ShardSpec((width,)))

    def forward(
        self,
        x: Tensor,
        update: Tensor | None = None,
        square_sum: Tensor | None = None,
        slices: TokenSlices | None = None,
    ) -> tuple[Tensor, Tensor]:
        x, normed = super().forward(x, update, square_sum)
        return x, normed * (self.weight if slices is None else slices.repeated(self.weight))


NORMS = {"simplermsnorm": SimpleRMSNorm, "rmsnorm": RMSNorm}
