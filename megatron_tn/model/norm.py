"""Normalisations over the embedding dimension. SimpleRMSNorm has no weights; RMSNorm is the ablation that has."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels import simple_rms_norm
from megatron_tn.parallel.sharding import ShardSpec, mark


class SimpleRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) over the last dimension, statistics in fp32 (arXiv 2307.14995, equation 12)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return simple_rms_norm(x, self.eps)


class RMSNorm(SimpleRMSNorm):
    """SimpleRMSNorm times a learnt weight [D], which every tensor-parallel rank holds whole."""

    def __init__(self, width: int, eps: float):
        super().__init__(width, eps)
        self.weight = mark(nn.Parameter(torch.empty(width)), ShardSpec((width,)))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.weight


NORMS = {"simplermsnorm": SimpleRMSNorm, "rmsnorm": RMSNorm}
