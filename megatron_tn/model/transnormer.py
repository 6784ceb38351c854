"""TransNormerLLM (arXiv 2307.14995): embedding, blocks of GLA and SGLU, final norm, head tied to the embedding.

    x = E[ids] * sqrt(D)                    the factor is left out where scale_embedding is false
    for each layer: x = x + GLA(norm(x)); x = x + SGLU(norm(x))
    logits = norm(x) E^T

Module names are those of the released weights, so a parameter's name is its name on disk.
"""

import math

import torch
from torch import Tensor

from kernels.gla.step_buffer import StepBuffer
from megatron_tn.config import ModelConfig
from megatron_tn.model import decoder
from megatron_tn.model.attention import GatedLinearAttention
from megatron_tn.model.base import Model
from megatron_tn.model.decay import all_decay_rates
from megatron_tn.model.decoder import Decoder
from megatron_tn.model.mixers import mixers_of
from megatron_tn.parallel.context import Axis, ParallelContext
from megatron_tn.parallel.embedding import VocabParallelHead
from megatron_tn.parallel.sharding import Box


class TransNormerModel(Decoder):
    """A `Decoder` with the token mixers of `ModelConfig.mixers`: gated linear attention, in a hybrid softmax attention
    too, and those of cosFormer and TransNormer (arXiv 2210.10340)."""

    def __init__(self, config: ModelConfig, axis: Axis):
        scale = math.sqrt(config.embed_dim) if config.scale_embedding else 1.0
        super().__init__(config, axis, mixers_of(config, axis), scale)
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

    @property
    def fixed_state(self) -> bool:
        """Whether the state's size does not depend on the number of tokens: linear attention in every layer."""
        return all(hasattr(block.token_mixer, "state_widths") for block in self.layers)

    def initial_state(self, rows: int) -> list[Tensor]:
        """Zeros [B, H / tp, K, d] for each layer, fp32 (fp64 for an fp64 model). Needs `fixed_state`."""
        weight, heads = self.embed_tokens.weight, len(self.rates[0])
        wide = torch.promote_types(weight.dtype, torch.float32)
        widths = [block.token_mixer.state_widths for block in self.layers]
        return [torch.zeros(rows, heads, *pair, dtype=wide, device=weight.device) for pair in widths]

    @property
    def bufferable_state(self) -> bool:
        """Whether there is `buffered_state`: gated linear attention in every layer."""
        return all(isinstance(block.token_mixer, GatedLinearAttention) for block in self.layers)

    def buffered_state(self, rows: int, slots: int) -> list[StepBuffer]:
        """`initial_state` in buffers of `slots` tokens, for steps that seldom write it."""
        weight = self.embed_tokens.weight
        slot = torch.zeros(1, dtype=torch.int64, device=weight.device)
        start = torch.zeros(rows, dtype=torch.int64, device=weight.device)
        return [StepBuffer.around(s, slots, weight.dtype, slot, start) for s in self.initial_state(rows)]


def build(config: ModelConfig, context: ParallelContext) -> Model:
    body = TransNormerModel(config, context.tp)
    return Model(config, context, body, VocabParallelHead(body.embed_tokens))


def initial_box(name: str, shape: tuple[int, ...], box: Box, config: ModelConfig, seed: int) -> Tensor:
    """`decoder.initial_box`; and LRPE's theta: 10000^(-2j/D) (arXiv 2307.09270), j = 0..D-1 counted across heads, so
    that each head has its own band of frequencies."""
    if not name.endswith("lrpe.theta"):
        return decoder.initial_box(name, shape, box, config, seed)
    j = torch.arange(config.embed_dim, dtype=torch.float64, device="cpu")
    theta = (10000 ** (-2 * j / config.embed_dim)).float().view(shape)
    return theta[tuple(slice(*edge) for edge in box)]
