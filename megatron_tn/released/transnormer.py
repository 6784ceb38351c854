"""config.json of the TransNormer family <-> `ModelConfig`.

The released family computes decay rates from the layer index. This writer also stores them (`decay_rates`, [L][H]), and
the reader compares them: a model with other decay rates than in training would be silently wrong.
"""

from typing import Any, get_args

import torch

from megatron_tn.config import ConfigError, ModelConfig
from megatron_tn.config.model import Act
from megatron_tn.model.decay import all_decay_rates
from megatron_tn.released.fields import flags_of, model_config, special_ids, whole_numbers

_NORMS = ("simplermsnorm", "rmsnorm", "layernorm")
_ACTS = {"swish": "silu"} | {name: name for name in get_args(Act)}


def from_released(values: dict[str, Any]) -> ModelConfig:
    """A config.json of the family as a `ModelConfig`.

    Raises:
        ConfigError: a field is missing, or its value is not supported.
    """
    required = ("vocab_size", "decoder_embed_dim", "decoder_layers", "decoder_attention_heads", "glu_dim")
    problems = whole_numbers(values, required) + flags_of(values, ("no_scale_embedding", "tie_word_embeddings", "bias"))
    act, norm = values.get("linear_act_fun", "swish"), values.get("norm_type", "simplermsnorm")
    if not isinstance(act, str) or act not in _ACTS:
        problems.append(f"config.json: linear_act_fun={act!r} is not one of {', '.join(_ACTS)}")
    if norm not in _NORMS:
        problems.append(f"config.json: norm_type={norm!r} is not one of {', '.join(_NORMS)}")
    flags = values.get("linear_use_lrpe_list") or [1]
    if not isinstance(flags, list) or not all(flag in (0, 1) for flag in flags):
        problems.append(f"config.json: linear_use_lrpe_list={flags!r} is not a list of 0 and 1")
    if values.get("tie_word_embeddings", True) is False:
        problems.append("config.json: tie_word_embeddings=false, but this model's head is its embedding")
    if values.get("bias") is True:
        problems.append("config.json: bias=true, but this model has no biases")
    width = values.get("decoder_embed_dim")
    if not problems and values.get("hidden_dim", width) != width:
        problems.append(f"config.json: hidden_dim={values['hidden_dim']} differs from decoder_embed_dim={width}")
    extra = values.get("megatron_tn", {})  # settings that the released family lacks
    if not isinstance(extra, dict):
        problems.append(f"config.json: megatron_tn={extra!r} is not a mapping")
    ids, wrong = special_ids(values)
    if problems := problems + wrong:
        raise ConfigError(problems)
    layers = values["decoder_layers"]
    flags = values.get("linear_use_lrpe_list") or [1] + [0] * (layers - 1)
    if len(flags) != layers:
        raise ConfigError(f"config.json: linear_use_lrpe_list has {len(flags)} entries but decoder_layers={layers}")
    fields = {
        "name": extra.get("name", "released"),
        "vocab_size": values["vocab_size"],
        "embed_dim": width,
        "layers": layers,
        "heads": values["decoder_attention_heads"],
        "glu_dim": values["glu_dim"],
        "scale_embedding": not values.get("no_scale_embedding", False),
        "absolute_positions": extra.get("absolute_positions", False),
        "norm": norm,
        "norm_eps": extra.get("norm_eps", 1e-6),
        "act": _ACTS[act],
        "glu_act": extra.get("glu_act", "none"),
        "gate": extra.get("gate", True),
        "lrpe": _lrpe([bool(flag) for flag in flags]),
        "decay": extra.get("decay", "released"),
        "decay_temperature": extra.get("decay_temperature", True),
        "init_std": values.get("init_std", 0.02),
        **ids,
    }
    config = model_config(fields)
    stored = values.get("decay_rates")
    if stored is not None and not _same_rates(stored, all_decay_rates(config)):
        raise ConfigError(
            f"config.json: the stored decay_rates are not those of decay={config.decay!r}, "
            f"decay_temperature={config.decay_temperature}: the model was trained with other rates"
        )
    return config


def to_released(config: ModelConfig, sequence_length: int | None = None) -> dict[str, Any]:
    """Fields of a released config.json, plus `decay_rates`, plus "megatron_tn": settings the family lacks.

    sequence_length: of training, which the family does not record.
    """
    return {
        "auto_map": {
            "AutoConfig": "modeling_transnormer.TransnormerConfig",
            "AutoModel": "modeling_transnormer.TransnormerModel",
            "AutoModelForCausalLM": "modeling_transnormer.TransnormerForCausalLM",
        },
        "vocab_size": config.vocab_size,
        "decoder_embed_dim": config.embed_dim,
        "hidden_dim": config.embed_dim,
        "decoder_layers": config.layers,
        "decoder_attention_heads": config.heads,
        "glu_dim": config.glu_dim,
        "linear_use_lrpe_list": [int(flag) for flag in config.lrpe_layers],
        "linear_act_fun": config.act,
        "norm_type": config.norm,
        "no_scale_embedding": not config.scale_embedding,
        "add_bos_token": False,
        "bias": False,
        "init_std": config.init_std,
        "pad_token_id": config.pad_id,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
        "tie_word_embeddings": True,
        "decay_rates": all_decay_rates(config),
        "megatron_tn": {
            "name": config.name,
            "absolute_positions": config.absolute_positions,
            "norm_eps": config.norm_eps,
            "glu_act": config.glu_act,
            "gate": config.gate,
            "decay": config.decay,
            "decay_temperature": config.decay_temperature,
        },
    }


def _lrpe(flags: list[bool]) -> str | list[bool]:
    """model.lrpe as a person writes it, so that a run of imported weights compares equal to its settings."""
    names = {"first": [True] + [False] * (len(flags) - 1), "all": [True] * len(flags), "none": [False] * len(flags)}
    return next((name for name, wanted in names.items() if flags == wanted), flags)


def _same_rates(a: Any, b: list[list[float]]) -> bool:
    try:
        a, b = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    except (TypeError, ValueError):  # not numbers, or rows of unequal length
        return False
    return a.shape == b.shape and bool(torch.allclose(a, b, rtol=1e-5, atol=1e-9))
