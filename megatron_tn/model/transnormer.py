"""TransNormerLLM (arXiv 2307.14995): embedding, blocks of GLA and SGLU, final norm, head tied to the embedding.

    x = E[ids] * sqrt(D)                    the factor is left out where scale_embedding is false
    for each layer: x = x + GLA(norm(x)); x = x + SGLU(norm(x))
    logits = norm(x) E^T

Module names are those of the released weights, so a parameter's name is its name on disk.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kernels.gla.step_buffer import StepBuffer
from megatron_tn.config import ModelConfig
from megatron_tn.model.base import DecodingState, Model
from megatron_tn.model.block import Block
from megatron_tn.model.decay import all_decay_rates
from megatron_tn.model.layout import TokenLayout
from megatron_tn.model.norm import NORMS
from megatron_tn.model.tiles import normal_box
from megatron_tn.parallel.context import Axis, ParallelContext
from megatron_tn.parallel.embedding import VocabParallelEmbedding, VocabParallelHead
from megatron_tn.parallel.sharding import Box


class TransNormerModel(nn.Module):
    """ids [B, n] -> normed hidden vectors [B, n, D], or this rank's slice [S, D]; and the blocks' states.

    See `megatron_tn.model.base.Body`.
    """

    def __init__(self, config: ModelConfig, axis: Axis):
        super().__init__()
        scale = math.sqrt(config.embed_dim) if config.scale_embedding else 1.0
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.embed_dim, axis, scale)
        self.layers = nn.ModuleList(Block(config, layer, axis) for layer in range(config.layers))
        self.final_norm = NORMS[config.norm](config.embed_dim, config.norm_eps)
        # Decay rates of this rank's heads, [L][H / tp]. Numbers, which the first forward pass makes a tensor: engines
        # cast buffers to the parameters' type, and ZeRO 3 every tensor made while a model is built, but rates are fp32.
        # They are an argument of the blocks, so that one compiled graph serves all layers.
        heads = config.heads // axis.size
        self.rates = [rates[axis.rank * heads : (axis.rank + 1) * heads] for rates in all_decay_rates(config)]
        self._decay: Tensor | None = None

    def decay(self, device: torch.device) -> Tensor:
        """Decay rates of this rank's heads, fp32 [L, H / tp]."""
        if self._decay is None or self._decay.device != device:
            self._decay = torch.tensor(self.rates, dtype=torch.float32, device=device)
        return self._decay

    def initial_state(self, rows: int) -> list[Tensor]:
        """Zeros [B, H / tp, K, d] for each layer, fp32 (fp64 for an fp64 model)."""
        states = []
        for block in self.layers:
            weight, lrpe = block.token_mixer.qkvu_proj.weight, block.token_mixer.lrpe
            width = weight.shape[0] // 4 // len(self.rates[0])
            shape = (rows, len(self.rates[0]), width * (1 if lrpe is None else 2), width)
            states.append(
                torch.zeros(shape, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
            )
        return states

    def buffered_state(self, rows: int, slots: int) -> list[StepBuffer]:
        """`initial_state` in buffers of `slots` tokens, for steps that seldom write it."""
        weight = self.embed_tokens.weight
        slot = torch.zeros(1, dtype=torch.int64, device=weight.device)
        start = torch.zeros(rows, dtype=torch.int64, device=weight.device)
        return [StepBuffer.around(s, slots, weight.dtype, slot, start) for s in self.initial_state(rows)]

    def forward(
        self, tokens: Tensor, layout: TokenLayout, state: DecodingState | None = None
    ) -> tuple[Tensor, list[Tensor | None]]:
        x = self.embed_tokens(tokens, layout.token_slices)
        decay = self.decay(x.device)
        states = []
        for layer, block in enumerate(self.layers):
            before = None if state is None else state.layers[layer]
            x, after = block(x, layout.continuing(before), decay[layer])
            states.append(after)
        _, x = self.final_norm(x, slices=layout.token_slices)
        return x, states


def build(config: ModelConfig, context: ParallelContext) -> Model:
    body = TransNormerModel(config, context.tp)
    return Model(config, context, body, VocabParallelHead(body.embed_tokens))


def initial_box(name: str, shape: tuple[int, ...], box: Box, config: ModelConfig, seed: int) -> Tensor:
    """The initial values within `box` of the logical parameter `name` of `shape`, fp32 on the CPU.

    Matrices: N(0, init_std), with the pad row of the embedding zero, unless that token begins or ends documents, too.
    Norm weights: ones. LRPE's theta:
    10000^(-2j/D) (arXiv 2307.09270), j = 0..D-1 counted across heads, so that each head has its own band of
    frequencies.
    """
    if name.endswith("norm.weight"):
        return torch.ones([stop - start for start, stop in box], device="cpu")
    if name.endswith("lrpe.theta"):
        j = torch.arange(config.embed_dim, dtype=torch.float64, device="cpu")
        theta = (10000 ** (-2 * j / config.embed_dim)).float().view(shape)
        return theta[tuple(slice(*edge) for edge in box)]
    value = normal_box(name, shape, box, config.init_std, seed)
    top, bottom = box[0]
    pads_alone = config.pad_id not in (config.bos_id, config.eos_id)
    if name == "model.embed_tokens.weight" and pads_alone and top <= config.pad_id < bottom:
        value[config.pad_id - top] = 0
    return value
