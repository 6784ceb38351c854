"""Gated linear attention, the token mixer of TransNormerLLM.

q, k, v, u = W_qkvu x
q, k = LRPE(act(q)), LRPE(act(k))                               LRPE only in the layers that are given it
o_t = sum over s <= t of exp(-r (t - s)) (q_t . k_s) v_s        no softmax, no scale
y = norm(o over all heads) * u
out = W_o y
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels import gla
from megatron_tn.config import ModelConfig
from megatron_tn.parallel.context import Axis
from megatron_tn.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron_tn.parallel.sequence import TokenSlices
from megatron_tn.parallel.sharding import ShardSpec, mark
from megatron_tn.parallel.state_passing import SequenceSlice


class LRPE(nn.Module):
    """theta [H, 1, d] of the linearised relative position encoding (arXiv 2307.09270), learnt and split by heads.

    x -> [x cos(theta t), x sin(theta t)] is a feature map, so the width of q and k doubles (within `kernels.gla`).
    """

    def __init__(self, heads: int, head_dim: int, axis: Axis):
        super().__init__()
        spec = ShardSpec((heads, 1, head_dim), dim=0)
        self.theta = mark(nn.Parameter(torch.empty(spec.local_shape(axis.rank, axis.size))), spec)

    def forward(self) -> Tensor:
        # Called, not looked into: ZeRO 3 gathers the parameters of the modules that it sees called.
        return self.theta


class GateNorm(nn.Module):
    """The weight of norm(o), for the ablation norm=rmsnorm: one per channel over all heads, so split by heads."""

    def __init__(self, width: int, axis: Axis):
        super().__init__()
        spec = ShardSpec((width,), dim=0)
        self.weight = mark(nn.Parameter(torch.empty(spec.local_shape(axis.rank, axis.size))), spec)

    def forward(self, y: Tensor) -> Tensor:
        return y * self.weight


class GatedLinearAttention(nn.Module):
    """x [B, N, D] -> [B, N, D] and sum(o^2) [B, N], with the recurrent state [B, H / tp, K, d] going in and coming out
    on request.

    slices: x and the result are this rank's slice [S, D] of the tokens; in between it holds all, and its heads.
    decay: rates of this rank's heads in this layer, fp32 [H / tp].

    The norm is over ALL heads together, which live on different ranks. Its per-token scale commutes with the gate and
    with W_o, so each rank forms (o * u) W_o^T and its part of sum(o^2); both are reduced, and the scale is taken last,
    by the norm that adds the result to the residual stream.
    """

    def __init__(self, config: ModelConfig, layer: int, axis: Axis):
        super().__init__()
        self.act = config.act
        self.gate = config.gate
        self.heads = config.heads // axis.size
        self.qkvu_proj = ColumnParallelLinear(config.embed_dim, 4 * config.embed_dim, axis, blocks=4)
        self.out_proj = RowParallelLinear(config.embed_dim, config.embed_dim, axis)
        self.lrpe = LRPE(config.heads, config.head_dim, axis) if config.lrpe_layers[layer] else None
        self.norm = GateNorm(config.embed_dim, axis) if config.norm == "rmsnorm" else None

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        decay: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        state: Tensor | None = None,
        return_state: bool = False,
        part: SequenceSlice | None = None,
        slices: TokenSlices | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        qkvu = self.qkvu_proj(x, slices)
        theta = None if self.lrpe is None else self.lrpe()
        if part is not None:  # of sequences that context-parallel ranks share
            y, square_sum = part.attend(qkvu, decay, theta, act=self.act, gate=self.gate, positions=positions)
        else:
            y, square_sum, state = gla(
                qkvu,
                decay,
                theta,
                act=self.act,
                gate=self.gate,
                positions=positions,
                initial_state=state,
                cu_seqlens=cu_seqlens,
                return_state=return_state,
            )
        if self.norm is not None:
            y = self.norm(y)  # weights commute with the gate
        out, square_sum = self.out_proj(y, slices, beside=square_sum)
        return out, square_sum, state
