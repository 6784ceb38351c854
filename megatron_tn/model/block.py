"""One layer: x + GLA(norm(x)), then x + SGLU(norm(x))."""

from __future__ import annotations

from torch import Tensor, nn

from megatron_tn.config import ModelConfig
from megatron_tn.model.attention import GatedLinearAttention
from megatron_tn.model.layout import TokenLayout
from megatron_tn.model.norm import NORMS
from megatron_tn.model.sglu import SGLU
from megatron_tn.parallel.context import Axis


class Block(nn.Module):
    """x [B, n, D] -> [B, n, D], or slices [S, D] -> [S, D]; and the token mixer's state, None without return_state.

    decay: rates of this layer's heads on this rank, fp32 [H / tp].
    """

    def __init__(self, config: ModelConfig, layer: int, axis: Axis):
        super().__init__()
        norm = NORMS[config.norm]
        self.token_norm = norm(config.embed_dim, config.norm_eps)
        self.token_mixer = GatedLinearAttention(config, layer, axis)
        self.channel_norm = norm(config.embed_dim, config.norm_eps)
        self.channel_mixer = SGLU(config, axis)

    def forward(self, x: Tensor, layout: TokenLayout, decay: Tensor) -> tuple[Tensor, Tensor | None]:
        slices = layout.token_slices
        x, normed = self.token_norm(x, slices=slices)
        mixed, square_sum, state = self.token_mixer(normed, layout, decay)
        x, normed = self.channel_norm(x, mixed, square_sum, slices)  # x += scaled mixed; normed = norm(x)
        return x + self.channel_mixer(normed, slices), state
