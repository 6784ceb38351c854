"""Gated linear attention, the token mixer of TransNormerLLM.

q, k, v, u = W_qkvu x
q, k = LRPE(act(q)), LRPE(act(k))                               LRPE in the layers that model.lrpe names
o_t = sum over s <= t of exp(-r (t - s)) (q_t . k_s) v_s        no softmax, no scale
y = norm(o over all heads) * u
out = W_o y
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels import gla
from megatron_tn.config import ModelConfig
from megatron_tn.model.layout import TokenLayout
from megatron_tn.parallel.context import Axis
from megatron_tn.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron_tn.parallel.sharding import ShardSpec, mark


class LRPE(nn.Module):
    """theta [H, 1, d], radians a position, of the linearised relative position encoding (arXiv 2307.09270), split by
    heads.

    `kernels.gla` applies the feature map x -> [x cos(theta t), x sin(theta t)], which doubles the width of q and k.
    """

    def __init__(self, heads: int, head_dim: int, axis: Axis):
        super().__init__()
        spec = ShardSpec((heads, 1, head_dim), dim=0)
        self.theta = mark(nn.Parameter(torch.empty(spec.local_shape(axis.rank, axis.size))), spec)

    def forward(self) -> Tensor:
        # A module that is called: ZeRO 3 gathers a module's parameters when its forward is called.
        return self.theta


class GateNorm(nn.Module):
    """The weight [D] of norm(o) in the ablation model.norm=rmsnorm, split by heads as o's channels are."""

    def __init__(self, width: int, axis: Axis):
        super().__init__()
        spec = ShardSpec((width,), dim=0)
        self.weight = mark(nn.Parameter(torch.empty(spec.local_shape(axis.rank, axis.size))), spec)

    def forward(self, y: Tensor) -> Tensor:
        return y * self.weight


class GatedLinearAttention(nn.Module):
    """x [B, n, D] -> [B, n, D], its sum(o^2) [B, n], and the state [B, H / tp, K, d] where layout.return_state.

    With layout.token_slices, x and both results are this rank's slice [S, ..] of the tokens; q, k, v, u and o are all
    tokens of this rank's heads.
    decay: rates of this rank's heads in this layer, fp32 [H / tp].

    The norm is over ALL heads together, which live on different ranks. Its scale of a token commutes with the gate and
    with W_o, so each rank forms (o * u) W_o^T and sum(o^2) over its heads. Both are summed over ranks, and the norm
    that adds the result to the residual stream applies the scale.
    """

    def __init__(self, config: ModelConfig, layer: int, axis: Axis):
        super().__init__()
        self.act = config.act
        self.gate = config.gate
        self.qkvu_proj = ColumnParallelLinear(config.embed_dim, 4 * config.embed_dim, axis, blocks=4)
        self.out_proj = RowParallelLinear(config.embed_dim, config.embed_dim, axis)
        self.lrpe = LRPE(config.heads, config.head_dim, axis) if config.lrpe_layers[layer] else None
        self.norm = GateNorm(config.embed_dim, axis) if config.norm == "rmsnorm" else None

    def forward(self, x: Tensor, layout: TokenLayout, decay: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        qkvu = self.qkvu_proj(x, layout.token_slices)
        theta = None if self.lrpe is None else self.lrpe()
        options = {"act": self.act, "gate": self.gate, "positions": layout.positions}
        if layout.sequence_slice is None:
            y, square_sum, state = gla(
                qkvu,
                decay,
                theta,
                **options,
                initial_state=layout.state,
                cu_seqlens=layout.cu_seqlens,
                return_state=layout.return_state,
            )
        else:
            y, square_sum = layout.sequence_slice.attend(qkvu, decay, theta, **options)
            state = None
        if self.norm is not None:
            y = self.norm(y)  # its weights commute with the gate
        out, square_sum = self.out_proj(y, layout.token_slices, beside=square_sum)
        return out, square_sum, state
