"""Parameter and FLOP counts of TransNormerLLM, by formula. One multiply-add counts as two operations.

Attention is counted as its recurrence: state update S += k^T v and readout q S. This is a lower bound for every kernel,
and depends neither on a kernel's chunk size nor on the sequence length.
"""

from __future__ import annotations

from megatron_tn.config import ModelConfig


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the whole model, the tied embedding once, without padding."""
    d, layers = config.embed_dim, config.layers
    count = config.vocab_size * d + layers * (5 * d * d + 3 * d * config.glu_dim) + d * sum(config.lrpe_layers)
    per_norm = {"simplermsnorm": 0, "rmsnorm": d, "layernorm": 2 * d}[config.norm]
    return count + per_norm * (3 * layers + 1)


def forward_flops_per_token(config: ModelConfig, sequence_length: int) -> dict[str, int]:
    """Part -> FLOPs of one token's forward pass, independent of sequence_length; "head" is the output projection."""
    d, head_dim, heads = config.embed_dim, config.head_dim, config.heads
    key_widths = [head_dim * (2 if lrpe else 1) for lrpe in config.lrpe_layers]
    return {
        "token_mixer_projections": config.layers * 2 * (4 * d * d + d * d),
        # Per head: k^T v into the state, and q times the state; LRPE doubles the width of q and k.
        "attention": sum(4 * heads * width * head_dim for width in key_widths),
        "channel_mixer": config.layers * 2 * 3 * d * config.glu_dim,
        "head": 2 * d * config.vocab_size,
    }
