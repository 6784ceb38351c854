"""Third-party models of the same shape, for comparison in the same process."""

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
        raise ConfigError("peer llama needs the extra hub: pip install -e '.[hub]'") from None
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


def retnet(shape: ModelConfig, device: torch.device) -> torch.nn.Module:
    """flash-linear-attention's RetNetForCausalLM with the sizes in `shape`, bf16. Of that library's models, RetNet has
    the layers nearest to ours: linear attention with a fixed decay a head, an output gate and a gated unit.

    Raises:
        ConfigError: flash-linear-attention is not installed.
    """
    try:
        from fla.models import RetNetConfig, RetNetForCausalLM
    except ImportError:
        raise ConfigError("peer retnet needs the extra bench: pip install -e '.[bench]'") from None
    sizes = RetNetConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.embed_dim,
        intermediate_size=shape.glu_dim,
        num_hidden_layers=shape.layers,
        num_heads=shape.heads,
        expand_v=1,
        norm_eps=shape.norm_eps,
        tie_word_embeddings=True,
    )
    with torch.device(device):
        return RetNetForCausalLM(sizes).to(torch.bfloat16)


def filled_cache(peer: torch.nn.Module, batch: int, count: int, most: int) -> object:
    """A static cache of transformers for `most` tokens of each of `batch` rows, of which the first `count` have random
    keys and values: a step takes as long as after a forward pass of so many tokens."""
    from transformers import StaticCache

    config, weight = peer.config, next(peer.parameters())
    cache = StaticCache(config=config, max_cache_len=most)
    heads, width = config.num_key_value_heads, config.head_dim
    cache.early_initialization(batch, heads, width, weight.dtype, weight.device)
    for layer in cache.layers:
        layer.keys[:, :, :count].normal_()
        layer.values[:, :, :count].normal_()
        layer.cumulative_length.fill_(count)
    return cache
