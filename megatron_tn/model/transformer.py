"""The Transformer beside TransNormerLLM: LLaMA's layers (arXiv 2302.13971), the head tied to the embedding.

x = E[ids]
for each layer: x = x + softmax attention with RoPE (RMSNorm(x)); x = x + SwiGLU(RMSNorm(x))
logits = RMSNorm(x) E^T
"""

from __future__ import annotations

from megatron_tn.config import ModelConfig
from megatron_tn.model.base import Model
from megatron_tn.model.decoder import Decoder
from megatron_tn.model.softmax_attention import SoftmaxAttention
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.parallel.embedding import VocabParallelHead


def build(config: ModelConfig, context: ParallelContext) -> Model:
    body = Decoder(config, context.tp, [SoftmaxAttention(config, context.tp) for _ in range(config.layers)])
    return Model(config, context, body, VocabParallelHead(body.embed_tokens))


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the whole model, the tied embedding once, without padding."""
    d, layers = config.embed_dim, config.layers
    return config.vocab_size * d + layers * (4 * d * d + 3 * d * config.glu_dim + 2 * d) + d


def forward_flops_per_token(config: ModelConfig, sequence_length: int) -> dict[str, int]:
    """Part -> FLOPs of one token's forward pass, the mean over a sequence; "head" is the output projection.

    Attention counts both products with all keys, as PyTorch's counter does, although causal kernels skip half of them.
    """
    d, layers = config.embed_dim, config.layers
    return {
        "token_mixer_projections": layers * 2 * 4 * d * d,
        "attention": layers * 2 * 2 * sequence_length * d,
        "channel_mixer": layers * 2 * 3 * d * config.glu_dim,
        "head": 2 * d * config.vocab_size,
    }
