"""The Transformer beside TransNormerLLM: LLaMA's layers (arXiv 2302.13971), the head tied to the embedding.

x = E[ids]
for each layer: x = x + softmax attention with RoPE (RMSNorm(x)); x = x + SwiGLU(RMSNorm(x))
logits = RMSNorm(x) E^T
"""

from megatron_tn.config import ModelConfig
from megatron_tn.model.base import Model
from megatron_tn.model.decoder import Decoder
from megatron_tn.model.softmax_attention import SoftmaxAttention
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.parallel.embedding import VocabParallelHead

# Part of a parameter's name -> the same part in LLaMA's files.
LLAMA_NAMES = {
    "token_norm": "input_layernorm",
    "token_mixer": "self_attn",
    "out_proj": "o_proj",
    "channel_norm": "post_attention_layernorm",
    "channel_mixer": "mlp",
    "l1": "gate_proj",
    "l2": "up_proj",
    "l3": "down_proj",
    "final_norm": "norm",
}


def build(config: ModelConfig, context: ParallelContext) -> Model:
    body = Decoder(config, context.tp, [SoftmaxAttention(config, context.tp) for _ in range(config.layers)])
    return Model(config, context, body, VocabParallelHead(body.embed_tokens))
