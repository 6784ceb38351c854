"""Parameter and FLOP counts, by formula. One multiply-add counts as two operations."""

from megatron_tn.config import ModelConfig
from megatron_tn.model.mixers import attention_flops, projections


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the whole model, the tied embedding once, without padding."""
    d, layers = config.embed_dim, config.layers
    matrices = sum(map(projections, config.mixers)) * d * d + layers * 3 * d * config.glu_dim
    over_heads = sum(kind in ("linear", "norm") for kind in config.mixers)  # mixers with a norm
    per_norm = {"simplermsnorm": 0, "rmsnorm": d, "layernorm": 2 * d}[config.norm]
    norms = per_norm * (2 * layers + over_heads + 1)
    return config.vocab_size * d + matrices + d * sum(config.lrpe_layers) + norms


def forward_flops_per_token(config: ModelConfig, sequence_length: int) -> dict[str, int]:
    """Part -> FLOPs of one token's forward pass, the mean over a sequence; "head" is the output projection."""
    d, kinds = config.embed_dim, zip(config.mixers, config.lrpe_layers, strict=True)
    return {
        "token_mixer_projections": sum(map(projections, config.mixers)) * 2 * d * d,
        "attention": sum(attention_flops(config, kind, lrpe, sequence_length) for kind, lrpe in kinds),
        "channel_mixer": config.layers * 2 * 3 * d * config.glu_dim,
        "head": 2 * d * config.vocab_size,
    }
