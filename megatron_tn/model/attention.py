"""Gated linear attention, the token mixer of TransNormerLLM.

q, k, v, u = W_qkvu x
q, k = LRPE(act(q)), LRPE(act(k))                               LRPE only in the layers of model.lrpe
o_t = sum over s <= t of exp(-r (t - s)) (q_t . k_s) v_s        no softmax, no scale
y = norm(o over all heads) * u
out = W_o y

act is model.act, r the head's decay rate in this layer, norm model.norm.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from kernels import gla
from kernels.gla.buffered import gla_step_buffered_
from kernels.gla.step_buffer import StepBuffer
from megatron_tn.config import ModelConfig
from megatron_tn.model.layout import TokenLayout
from megatron_tn.model.norm import HeadLayerNorm, HeadWeight
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


class GatedLinearAttention(nn.Module):
    """x [B, n, D] -> (output [B, n, D] without the norm's scale, sum(o^2) [B, n], state [B, H / tp, K, d] or None).
    With model.norm=layernorm: the whole output, None in the place of sum(o^2), and the state.

    The state is None unless layout.return_state. With layout.token_slices, x, output and sum(o^2) are this rank's slice
    [S, ..] of the tokens; q, k, v, u and o have all tokens of this rank's heads.
    decay: rates of this rank's heads in this layer, fp32 [H / tp].

    norm(o) is over the channels of all H heads, which are split over ranks. Its scale (one number a token) commutes
    with the gate and with W_o, so each rank computes (o * u) W_o^T and sum(o^2) over its heads, and both are summed
    over ranks. The block's channel_norm applies the scale as it adds the output to the residual stream. LayerNorm does
    not commute: it reduces its statistics over ranks before W_o, and the gate follows it.

    noting: whether the largest elements of operands that fp8 products quantise are noted.
    """

    noting = False

    def __init__(self, config: ModelConfig, layer: int, axis: Axis):
        super().__init__()
        self.act = config.act
        self.gate = config.gate
        self.state_widths = (config.head_dim * (2 if config.lrpe_layers[layer] else 1), config.head_dim)  # K, d
        self.add_projection(config.embed_dim, config.heads, axis)
        self.out_proj = RowParallelLinear(config.embed_dim, config.embed_dim, axis)
        self.lrpe = LRPE(config.heads, config.head_dim, axis) if config.lrpe_layers[layer] else None
        self.norm = None
        if config.norm == "rmsnorm":
            self.norm = HeadWeight(config.embed_dim, axis)
        elif config.norm == "layernorm":
            self.norm = HeadLayerNorm(config.embed_dim, config.norm_eps, axis)

    def add_projection(self, width: int, heads: int, axis: Axis) -> None:
        self.qkvu_proj = ColumnParallelLinear(width, 4 * width, axis, blocks=4, heads=heads)

    def projected(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """q | k | v | u of this rank's heads, [B, n, 4 D / tp]."""
        return self.qkvu_proj(x, layout.token_slices)

    def forward(self, x: Tensor, layout: TokenLayout, decay: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        qkvu = self.projected(x, layout)
        theta = None if self.lrpe is None else self.lrpe()
        commutes = not isinstance(self.norm, HeadLayerNorm)
        gate = self.gate and commutes
        y, square_sum, state = attend(qkvu, decay, theta, layout, act=self.act, gate=gate, noting=self.noting)
        if not commutes:
            y = self.norm(y)  # y = o
            u = qkvu[..., -y.shape[-1] :]
            return self.out_proj(y * u if self.gate else y, layout.token_slices), None, state
        if self.norm is not None:
            y = self.norm(y)  # y = o * u: elementwise weight and gate commute
        out, square_sum = self.out_proj(y, layout.token_slices, beside=square_sum)
        return out, square_sum, state


class NormAttention(GatedLinearAttention):
    """Linear attention of TransNormer (arXiv 2210.10340, equation 8): out = W_o norm(o), without gate and so without u.

    Otherwise as `GatedLinearAttention`, at model.gate=false.
    """

    def add_projection(self, width: int, heads: int, axis: Axis) -> None:
        self.qkv_proj = ColumnParallelLinear(width, 3 * width, axis, blocks=3, heads=heads)

    def projected(self, x: Tensor, layout: TokenLayout) -> Tensor:
        qkv = self.qkv_proj(x, layout.token_slices)
        return pad(qkv, (0, qkv.shape[-1] // 3))  # u, which no gate reads


def attend(
    qkvu: Tensor,
    decay: Tensor,
    theta: Tensor | None,
    layout: TokenLayout,
    *,
    act: str,
    gate: bool,
    noting: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`kernels.gla` of the tokens, documents and states that the layout says; with context parallelism, of this rank's
    slice of the sequence."""
    if isinstance(layout.state, StepBuffer):
        return *gla_step_buffered_(qkvu, *layout.state, decay, theta, act, gate, layout.positions), None
    options = {"act": act, "gate": gate, "positions": layout.positions}
    if layout.sequence_slice is not None:
        return *layout.sequence_slice.attend(qkvu, decay, theta, **options), None
    return gla(
        qkvu,
        decay,
        theta,
        **options,
        initial_state=layout.state,
        cu_seqlens=layout.cu_seqlens,
        return_state=layout.return_state,
        update_state=layout.update_state,
        noting=noting and torch.is_grad_enabled(),
    )
