"""Normalisations over the embedding dimension: SimpleRMSNorm, and with a learnt weight RMSNorm (an ablation)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels import add_scaled_simple_rms_norm, add_simple_rms_norm, branch_simple_rms_norm
from megatron_tn.parallel.sequence import TokenSlices
from megatron_tn.parallel.sharding import ShardSpec, mark


class SimpleRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) over the last dimension, statistics in fp32 (arXiv 2307.14995, equation 12).

    forward(x, update) -> (x + update, norm(x + update)), one pass over memory in each direction; without an update,
    (x, norm(x)). x [.., D] is the residual stream, and update [.., D] the output of the branch before.

    square_sum [..]: sum(o^2) of a `GatedLinearAttention`, whose output `update` is not yet normed: update is then
    multiplied by 1 / sqrt(square_sum / D + eps).
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

    slices: each rank norms its slice of the tokens, so the weight's gradient is summed over ranks.
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
