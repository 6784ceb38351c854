"""cosFormer's attention (arXiv 2202.08791), a linear attention with a denominator and without decay.

q, k, v = W_qkv x
w_ts = (relu(q_t) . relu(k_s)) cos(pi/2 (t - s) / M)            M = model.max_length; w_ts >= 0 for t - s <= M
y_t = sum over s <= t of w_ts v_s / sum over s <= t of w_ts
out = W_o y

cos(a - b) = cos a cos b + sin a sin b, so the weights are those of LRPE with a constant theta = pi / 2M, and the
denominator is one more column of v, of ones: both run in `kernels.gla`, with its states, slices and documents.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from megatron_tn.config import ModelConfig
from megatron_tn.model.attention import attend
from megatron_tn.model.layout import TokenLayout
from megatron_tn.parallel.context import Axis
from megatron_tn.parallel.linear import ColumnParallelLinear, RowParallelLinear

MORE_COLUMNS = 8  # per head: the column of ones, and zeros that keep bf16 rows a multiple of 16 bytes


class CosineAttention(nn.Module):
    """x [B, n, D] -> (output [B, n, D], None, state [B, H / tp, 2 w, w] or None), w = d + MORE_COLUMNS.

    Called as `GatedLinearAttention` is; decay is zero.
    """

    def __init__(self, config: ModelConfig, axis: Axis):
        super().__init__()
        self.head_dim, self.eps = config.head_dim, config.norm_eps
        self.state_widths = (2 * (self.head_dim + MORE_COLUMNS), self.head_dim + MORE_COLUMNS)
        self.angle = math.pi / 2 / config.max_length  # radians a position
        self.qkv_proj = ColumnParallelLinear(config.embed_dim, 3 * config.embed_dim, axis, blocks=3, heads=config.heads)
        self.out_proj = RowParallelLinear(config.embed_dim, config.embed_dim, axis)

    def forward(self, x: Tensor, layout: TokenLayout, decay: Tensor) -> tuple[Tensor, None, Tensor | None]:
        qkv = self.qkv_proj(x, layout.token_slices).unflatten(-1, (3, -1, self.head_dim))
        wide = pad(qkv, (0, MORE_COLUMNS, 0, 0, 0, 1))  # [B, n, 4, H / tp, w]; nothing reads the fourth part, u
        wide[..., 2, :, self.head_dim] = 1
        dtype = torch.promote_types(x.dtype, torch.float32)
        theta = torch.full((wide.shape[-2], 1, wide.shape[-1]), self.angle, dtype=dtype, device=x.device)
        sums, _, state = attend(wide.flatten(2), decay, theta, layout, act="relu", gate=False)
        sums = sums.unflatten(-1, (-1, wide.shape[-1]))
        numerator, denominator = sums[..., : self.head_dim], sums[..., self.head_dim, None]
        y = numerator / denominator.clamp(min=self.eps)  # both are 0 where relu(q_t) is
        return self.out_proj(y.flatten(2), layout.token_slices), None, state
