"""One layer: x + GLA(norm(x)), then x + SGLU(norm(x))."""

from __future__ import annotations

from torch import Tensor, nn

from megatron_tn.config import ModelConfig
from megatron_tn.model.attention import GatedLinearAttention
from megatron_tn.model.norm import NORMS
from megatron_tn.model.sglu import SGLU
from megatron_tn.parallel.context import Axis
from megatron_tn.parallel.sequence import TokenSlices
from megatron_tn.parallel.state_passing import SequenceSlice


class Block(nn.Module):
    """x [B, N, D] -> [B, N, D], or its slices -> slices; and the token mixer's state when it is asked for."""

    def __init__(self, config: ModelConfig, layer: int, axis: Axis):
        super().__init__()
        norm = NORMS[config.norm]
        self.token_norm = norm(config.embed_dim, config.norm_eps)
        self.token_mixer = GatedLinearAttention(config, layer, axis)
        self.channel_norm = norm(config.embed_dim, config.norm_eps)
        self.channel_mixer = SGLU(config, axis)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        decay: Tensor,
        cu_seqlens: Tensor | None = None,
        state: Tensor | None = None,
        return_state: bool = False,
        part: SequenceSlice | None = None,
        slices: TokenSlices | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        x, normed = self.token_norm(x, slices=slices)
        mixed, square_sum, state = self.token_mixer(
            normed,
            positions,
            decay,
            cu_seqlens=cu_seqlens,
            state=state,
            return_state=return_state,
            part=part,
            slices=slices,
        )
        x, normed = self.channel_norm(x, mixed, square_sum, slices)  # of x + mixed, once that is normed
        return x + self.channel_mixer(normed, slices), state
