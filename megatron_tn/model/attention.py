"""Gated linear attention, the token mixer of TransNormerLLM.

q, k, v, u = W_qkvu x
q, k = LRPE(act(q)), LRPE(act(k))                               LRPE only in the layers of model.lrpe
o_t = sum over s <= t of exp(-r (t - s)) (q_t . k_s) v_s        no softmax, no scale
y = norm(o over all heads) * u
out = W_o y

act is model.act, r the head's decay rate in this layer, norm model.norm.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels import gla
from kernels.gla.buffered import gla_step_buffered_
from kernels.gla.step_buffer import StepBuffer
from megatron_tn.config import ModelConfig
from megatron_tn.model.layout import TokenLayout
from megatron_tn.parallel.context import Axis
from megatron_tn.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron_tn.parallel.sharding import ShardSpec, mark


class LRPE(nn.Module):
    """Linearised relative position encoding (arXiv 2307.09270): the parameter theta [H, 1, d], in radians per position,
    split by heads over tensor parallelism.

    `kernels.gla` applies the feature map x -> [x cos(theta t), x sin(theta t)], which doubles the width of q and k.
    """

    def __init__(self, heads: int, head_dim: int, axis: Axis):
        super().__init__()
        spec = ShardSpec((heads, 1, head_dim), dim=0)
        self.theta = mark(nn.Parameter(torch.empty(spec.local_shape(axis.rank, axis.size))), spec)

    def forward(self) -> Tensor:
        # theta is read by calling this module, since ZeRO 3 gathers a module's parameters when its forward is called.
        return self.theta


class GateNorm(nn.Module):
    """The learnt weight [D] of norm(o) for model.norm=rmsnorm (an ablation), split over tp like the channels of o."""

    def __init__(self, width: int, axis: Axis):
        super().__init__()
        spec = ShardSpec((width,), dim=0)
        self.weight = mark(nn.Parameter(torch.empty(spec.local_shape(axis.rank, axis.size))), spec)

    def forward(self, y: Tensor) -> Tensor:
        return y * self.weight


class GatedLinearAttention(nn.Module):
    """x [B, n, D] -> (output [B, n, D] without the norm's scale, sum(o^2) [B, n], state [B, H / tp, K, d] or None).

    The state is None unless layout.return_state. With layout.token_slices, x, output and sum(o^2) are this rank's slice
    [S, ..] of the tokens; q, k, v, u and o have all tokens of this rank's heads.
    decay: rates of this rank's heads in this layer, fp32 [H / tp].

    norm(o) is over the channels of all H heads, which are split over ranks. Its scale (one number a token) commutes
    with the gate and with W_o, so each rank computes (o * u) W_o^T and sum(o^2) over its heads, and both are summed
    over ranks. The block's channel_norm applies the scale as it adds the output to the residual stream.
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
        if isinstance(layout.state, StepBuffer):
            y, square_sum = gla_step_buffered_(qkvu, *layout.state, decay, theta, self.act, self.gate, layout.positions)
            state = None
        elif layout.sequence_slice is None:
            y, square_sum, state = gla(
                qkvu,
                decay,
                theta,
                **options,
                initial_state=layout.state,
                cu_seqlens=layout.cu_seqlens,
                return_state=layout.return_state,
                update_state=layout.update_state,
            )
        else:
            y, square_sum = layout.sequence_slice.attend(qkvu, decay, theta, **options)
            state = None
        if self.norm is not None:
            y = self.norm(y)  # y = o * u: elementwise weight and gate commute
        out, square_sum = self.out_proj(y, layout.token_slices, beside=square_sum)
        return out, square_sum, state
