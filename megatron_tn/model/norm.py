"""Normalisations over the embedding dimension: SimpleRMSNorm (no parameters), and RMSNorm (an ablation)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels import (
    add_rms_norm,
    add_scaled_simple_rms_norm,
    add_simple_rms_norm,
    branch_rms_norm,
    branch_simple_rms_norm,
)
from megatron_tn.parallel.sequence import TokenSlices
from megatron_tn.parallel.sharding import ShardSpec, mark


class SimpleRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) over the last dimension, statistics in fp32 (arXiv 2307.14995, equation 12).

    forward(x, update) -> (x + update, norm(x + update)), fused: one pass over memory in forward and one in backward.
    forward(x) -> (x, norm(x)). x [.., D]: residual stream; update [.., D]: output of the preceding branch.

    square_sum [..]: sum(o^2) returned by `GatedLinearAttention`, whose output lacks the norm's scale: forward first
    multiplies `update` by 1 / sqrt(square_sum / D + eps).
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
    """SimpleRMSNorm times a learnt weight [D], replicated over tensor-parallel ranks.

    slices: with sequence parallelism each rank normalises its own tokens, so dweight is summed over ranks.
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
        weight = self.weight if slices is None else slices.repeated(self.weight)
        if square_sum is not None:
            x, normed = super().forward(x, update, square_sum)
            return x, normed * weight
        return branch_rms_norm(x, weight, self.eps) if update is None else add_rms_norm(x, update, weight, self.eps)


NORMS = {"simplermsnorm": SimpleRMSNorm, "rmsnorm": RMSNorm}
