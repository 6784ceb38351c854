"""config.json of a LLaMA whose head is its embedding <-> `ModelConfig` of a Transformer.

transformers' own LlamaForCausalLM runs the export. Its RoPE, as ours, rotates a head's halves.
"""

from typing import Any

from megatron_tn.config import ConfigError, ModelConfig
from megatron_tn.released.fields import model_config, special_ids, whole_numbers

# Field -> (its value where it is absent, the one value that this Transformer has).
FIXED = {
    "hidden_act": ("silu", "silu"),
    "attention_bias": (False, False),
    "mlp_bias": (False, False),
    "tie_word_embeddings": (False, True),
}
ANY_LENGTH = 2048  # max_position_embeddings of weights whose training is not known; LLaMA's own default


def from_released(values: dict[str, Any]) -> ModelConfig:
    """A LLaMA's config.json as a `ModelConfig`.

    Raises:
        ConfigError: a field is missing, or its value is not supported: grouped queries, scaled RoPE, an untied head.
    """
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    problems = whole_numbers(values, sizes)
    for name, (absent, needed) in FIXED.items():
        if values.get(name, absent) != needed:
            problems.append(f"config.json: {name}={values.get(name, absent)!r}, but this model has {needed!r}")
    heads, width = values.get("num_attention_heads"), values.get("hidden_size")
    if (groups := values.get("num_key_value_heads") or heads) != heads:
        problems.append(f"config.json: num_key_value_heads={groups!r} differs from num_attention_heads={heads!r}")
    if not problems and heads and (head_dim := values.get("head_dim") or width // heads) != width // heads:
        problems.append(f"config.json: head_dim={head_dim!r} is not hidden_size={width} / num_attention_heads={heads}")
    rope = values.get("rope_parameters") or {}
    scaling = values.get("rope_scaling") or rope
    if not isinstance(rope, dict) or not isinstance(scaling, dict):
        problems.append(f"config.json: rope_parameters={rope!r} is not a mapping")
    elif (kind := scaling.get("rope_type", scaling.get("type", "default"))) != "default":
        problems.append(f"config.json: rope_type={kind!r} is not default")
    else:
        bases = [base for base in (rope.get("rope_theta"), values.get("rope_theta")) if base is not None]
        if len(bases) > 1 and bases[0] != bases[1]:
            problems.append(
                f"config.json: rope_theta={bases[1]!r} differs from rope_parameters.rope_theta={bases[0]!r}"
            )
    extra = values.get("megatron_tn", {})  # settings that a LLaMA lacks
    if not isinstance(extra, dict):
        problems.append(f"config.json: megatron_tn={extra!r} is not a mapping")
        extra = {}
    ids, wrong = special_ids(values, extra.get("pad_id", 0))
    if problems := problems + wrong:
        raise ConfigError(problems)
    fields = {
        "name": extra.get("name", "released"),
        "architecture": "transformer",
        "vocab_size": values["vocab_size"],
        "embed_dim": width,
        "layers": values["num_hidden_layers"],
        "heads": heads,
        "glu_dim": values["intermediate_size"],
        "scale_embedding": False,
        "norm": "rmsnorm",
        "norm_eps": values.get("rms_norm_eps", 1e-6),
        "glu_act": "silu",
        "rope_base": bases[0] if bases else 10000.0,
        "init_std": values.get("initializer_range", 0.02),
        **ids,
    }
    return model_config(fields)


def to_released(config: ModelConfig, sequence_length: int | None = None) -> dict[str, Any]:
    """Fields of a LLaMA's config.json. sequence_length: of training, where it is known."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.glu_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,  # of transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "max_position_embeddings": sequence_length or ANY_LENGTH,
        "initializer_range": config.init_std,
        # transformers would not train the embedding of a pad that is bos or eos, too; generation_config.json has it.
        "pad_token_id": None if config.pad_id in (config.bos_id, config.eos_id) else config.pad_id,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
        "tie_word_embeddings": True,
        "megatron_tn": {"name": config.name, "pad_id": config.pad_id},
    }
