"""Normalisations: SimpleRMSNorm (no parameters), and two ablations with parameters, RMSNorm and LayerNorm.

NORMS are of the residual stream, which every rank has whole; HeadWeight and HeadLayerNorm are of the token mixer's o,
whose D channels are split over tensor parallel by heads.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from kernels import (
    add_rms_norm,
    add_scaled_simple_rms_norm,
    add_simple_rms_norm,
    branch_rms_norm,
    branch_simple_rms_norm,
)
from megatron_tn.parallel.collectives import copy_to, reduce_from
from megatron_tn.parallel.context import Axis
from megatron_tn.parallel.sequence import TokenSlices
from megatron_tn.parallel.sharding import ShardSpec, mark


class SimpleRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) over the last dimension, statistics in fp32 (arXiv 2307.14995, equation 12).

    forward(x, update) -> (x + update, norm(x + update)), fused: one pass over memory in forward and one in backward.
    forward(x) -> (x, norm(x)). x [.., D]: residual stream; update [.., D]: output of the preceding branch.

    square_sum [..]: sum(o^2) returned by `GatedLinearAttention`, whose output lacks the norm's scale: forward first
    multiplies `update` by 1 / sqrt(square_sum / D + eps).

    noting: whether backward passes note the largest element of a gradient that fp8 products quantise.
    """

    noting = False

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
            return branch_simple_rms_norm(x, self.eps, self.noting)
        if square_sum is None:
            return add_simple_rms_norm(x, update, self.eps)
        return add_scaled_simple_rms_norm(x, update, square_sum, self.eps, self.noting)


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


class LayerNorm(nn.Module):
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias (arXiv 1607.06450); weight and bias [D], replicated.

    Arguments and results as in `SimpleRMSNorm`; square_sum is None, since `HeadLayerNorm` leaves no scale to apply.
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = mark(nn.Parameter(torch.empty(width)), ShardSpec((width,)))
        self.bias = mark(nn.Parameter(torch.empty(width)), ShardSpec((width,)))

    def forward(
        self,
        x: Tensor,
        update: Tensor | None = None,
        square_sum: None = None,
        slices: TokenSlices | None = None,
    ) -> tuple[Tensor, Tensor]:
        x = x if update is None else x + update
        weight, bias = self.weight, self.bias
        if slices is not None:
            weight, bias = slices.repeated(weight), slices.repeated(bias)
        return x, layer_norm(x, x.shape[-1:], weight, bias, self.eps)


class HeadWeight(nn.Module):
    """norm(o) u for model.norm=rmsnorm: y = o * u [B, N, D / tp] -> y * weight, this rank's part of the weight [D].

    The norm's scale commutes with weight, gate and W_o, and is applied by the block's channel_norm.
    """

    def __init__(self, width: int, axis: Axis):
        super().__init__()
        spec = ShardSpec((width,), dim=0)
        self.weight = mark(nn.Parameter(torch.empty(spec.local_shape(axis.rank, axis.size))), spec)

    def forward(self, y: Tensor) -> Tensor:
        return y * self.weight


class HeadLayerNorm(nn.Module):
    """LayerNorm of o over the channels of all heads: o [B, N, D / tp] -> [B, N, D / tp], statistics over ranks."""

    def __init__(self, width: int, eps: float, axis: Axis):
        super().__init__()
        self.width, self.eps, self.axis = width, eps, axis
        spec = ShardSpec((width,), dim=0)
        shape = spec.local_shape(axis.rank, axis.size)
        self.weight = mark(nn.Parameter(torch.empty(shape)), spec)
        self.bias = mark(nn.Parameter(torch.empty(shape)), spec)

    def forward(self, o: Tensor) -> Tensor:
        if self.axis.size == 1:
            return layer_norm(o, o.shape[-1:], self.weight, self.bias, self.eps)
        wide = o.to(torch.promote_types(o.dtype, torch.float32))
        centred = wide - self._mean(wide)
        normed = centred * torch.rsqrt(self._mean(centred.square()) + self.eps)
        return normed.to(o.dtype) * self.weight + self.bias

    def _mean(self, x: Tensor) -> Tensor:
        """The mean over the channels of all ranks, [B, N, 1]."""
        total = reduce_from(x.sum(-1, keepdim=True), self.axis)
        return copy_to(total, self.axis) / self.width  # every rank uses the sum, so its gradient is summed over ranks


NORMS = {"simplermsnorm": SimpleRMSNorm, "rmsnorm": RMSNorm, "layernorm": LayerNorm}
