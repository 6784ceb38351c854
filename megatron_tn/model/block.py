"""One layer: x + mixer(norm(x)), then x + SGLU(norm(x))."""

from torch import Tensor, nn

from megatron_tn.config import ModelConfig
from megatron_tn.model.layout import TokenLayout
from megatron_tn.model.norm import NORMS
from megatron_tn.model.sglu import SGLU
from megatron_tn.parallel.context import Axis


class Block(nn.Module):
    """x [B, n, D] -> [B, n, D], or slices [S, D] -> [S, D]; and the token mixer's state, None without return_state.

    token_mixer: of megatron_tn.model.mixers. decay: rates of this layer's heads on this rank, fp32
    [H / tp]; None for softmax attention.
    """

    def __init__(self, config: ModelConfig, axis: Axis, token_mixer: nn.Module):
        super().__init__()
        norm = NORMS[config.norm]
        self.token_norm = norm(config.embed_dim, config.norm_eps)
        self.token_mixer = token_mixer
        self.channel_norm = norm(config.embed_dim, config.norm_eps)
        self.channel_mixer = SGLU(config, axis)

    def forward(self, x: Tensor, layout: TokenLayout, decay: Tensor | None) -> tuple[Tensor, Tensor | None]:
        slices = layout.token_slices
        x, normed = self.token_norm(x, slices=slices)
        mixed, square_sum, state = self.token_mixer(normed, layout, decay)
        # x += mixed, scaled first where there is a square_sum; normed = norm(x)
        x, normed = self.channel_norm(x, mixed, square_sum, slices)
        return x + self.channel_mixer(normed, slices), state
