"""Third-party models of the same shape, for comparison in the same process."""

from __future__ import annotations

import torch

from megatron_tn.config import ConfigError, ModelConfig


def llama(shape: ModelConfig, device: torch.device, *, head: bool = False) -> torch.nn.Module:
    """A Hugging Face LlamaModel, or with a `head` LlamaForCausalLM, with the sizes in `shape`, bf16: of a Transformer
    the same layers, of a TransNormerLLM layers without the gate, so fewer parameters.

    Raises:
        ConfigError: transformers is not installed.
    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
    except ImportError:
        raise ConfigError("a peer needs transformers: pip install transformers") from None
    sizes = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.embed_dim,
        intermediate_size=shape.glu_dim,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        rms_norm_eps=shape.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_base},
        max_position_embeddings=2**20,
        attn_implementation="sdpa",
        tie_word_embeddings=True,
    )
    with torch.device(device):
        return (LlamaForCausalLM if head else LlamaModel)(sizes).to(torch.bfloat16)
