"""What the architectures share: embedding, blocks of a token and a channel mixer, final norm, tied head.

x = E[ids] * scale
for each layer: x = x + mixer(norm(x)); x = x + SGLU(norm(x))
logits = norm(x) E^T

An ablation adds sinusoids of the position to the first x (model.absolute_positions).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megatron_tn.config import ModelConfig
from megatron_tn.model.base import DecodingState
from megatron_tn.model.block import Block
from megatron_tn.model.layout import TokenLayout
from megatron_tn.model.norm import NORMS
from megatron_tn.model.positions import sinusoids
from megatron_tn.model.tiles import normal_box
from megatron_tn.parallel.context import Axis
from megatron_tn.parallel.embedding import VocabParallelEmbedding
from megatron_tn.parallel.sharding import Box


class Decoder(nn.Module):
    """ids [B, n] -> normed hidden vectors [B, n, D], or this rank's slice [S, D]; and the blocks' states.

    See `megatron_tn.model.base.Body`. mixers: the layers' token mixers, see `megatron_tn.model.block.Block`.
    """

    def __init__(self, config: ModelConfig, axis: Axis, mixers: Sequence[nn.Module], scale: float = 1.0):
        super().__init__()
        self.absolute_positions = config.absolute_positions
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.embed_dim, axis, scale)
        self.layers = nn.ModuleList(Block(config, axis, mixer) for mixer in mixers)
        self.final_norm = NORMS[config.norm](config.embed_dim, config.norm_eps)

    def decay(self, device: torch.device) -> Sequence[Tensor | None]:
        """Each layer's decay rates of this rank's heads, fp32 [H / tp]; None where its mixer has none."""
        return [None] * len(self.layers)

    def forward(
        self, tokens: Tensor, layout: TokenLayout, state: DecodingState | None = None
    ) -> tuple[Tensor, list[Tensor | None]]:
        x = self.embed_tokens(tokens, layout.token_slices)
        if self.absolute_positions:
            x = x + sinusoids(layout, x.shape[-1]).to(x.dtype)
        decay = self.decay(x.device)
        states = []
        for layer, block in enumerate(self.layers):
            before = None if state is None else state.layers[layer]
            x, after = block(x, layout.continuing(before), decay[layer])
            states.append(after)
        _, x = self.final_norm(x, slices=layout.token_slices)
        return x, states


def initial_box(name: str, shape: tuple[int, ...], box: Box, config: ModelConfig, seed: int) -> Tensor:
    """The initial values within `box` of the logical parameter `name` of `shape`, fp32 on the CPU.

    Matrices: N(0, init_std), with the pad row of the embedding zero, unless that token begins or ends documents, too.
    Norm weights: ones; norm biases: zeros.
    """
    if name.endswith(("norm.weight", "norm.bias")):
        return torch.full([stop - start for start, stop in box], float(name.endswith("weight")), device="cpu")
    value = normal_box(name, shape, box, config.init_std, seed)
    top, bottom = box[0]
    pads_alone = config.pad_id not in (config.bos_id, config.eos_id)
    if name == "model.embed_tokens.weight" and pads_alone and top <= config.pad_id < bottom:
        value[config.pad_id - top] = 0
    return value
