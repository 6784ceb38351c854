"""The settings `model.*`: shape and variant of a TransNormerLLM, or of the Transformer that it is compared with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from pydantic.dataclasses import dataclass

from megatron_tn.config.bounds import AboveZero, Count, FromZero, Positive, Relations, out_of_bounds
from megatron_tn.config.mapping import STRICT


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """Shape and variant of a TransNormerLLM (arXiv 2307.14995), with the released family's semantics as defaults; or
    shape of a Transformer (conf/model/transformer_*.yaml)."""

    name: str = "385m"  # of the size, for reports
    architecture: Literal["transnormer", "transformer"] = "transnormer"  # of megatron_tn.model.registry
    vocab_size: Positive = 64000  # V, entries of the tokenizer; the vocabulary-parallel embedding pads it by itself
    embed_dim: Positive = 1024  # D
    layers: Positive = 24  # L
    heads: Positive = 8  # H; the released sizes have D / H = 128
    glu_dim: Positive = 2816  # F
    scale_embedding: bool = True  # x = E[ids] * sqrt(D); the released 3B and larger models have x = E[ids]
    absolute_positions: bool = False  # sinusoids of the position are added to x, as in arXiv 1706.03762 (an ablation)
    norm: Literal["simplermsnorm", "rmsnorm", "layernorm"] = "simplermsnorm"
    norm_eps: FromZero = 1e-6  # added to the mean square, or the variance, under the root
    act: Literal["silu", "none", "1+elu"] = "silu"  # of q and k
    glu_act: Literal["none", "silu"] = "none"
    gate: bool = True  # the output gate u of the token mixer
    lrpe: Literal["first", "all", "none"] | list[bool] = "first"  # the layers that apply LRPE
    decay: Literal["released", "paper", "none"] = "released"  # form of the decay rates, one a head
    decay_temperature: bool = True  # the factor 1 - l/(L-1) of layer l's decay rates
    rope_base: AboveZero = 10000.0  # RoPE's angles are base^(-2 j / d) t; softmax attention alone has RoPE
    init_std: FromZero = 0.02  # of the matrices' normal initial values
    pad_id: Count = 0  # training takes this and the next two from the shards' tokenizer
    bos_id: Count = 1  # of the token that begins a document
    eos_id: Count = 2  # of the token that ends a document

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.heads

    @property
    def lrpe_layers(self) -> list[bool]:
        """[L]: whether each layer applies LRPE."""
        if isinstance(self.lrpe, list):
            return list(self.lrpe)
        return [self.lrpe == "all" or (self.lrpe == "first" and layer == 0) for layer in range(self.layers)]

    def shortened(self, layers: int) -> ModelConfig:
        """This model's first `layers` layers."""
        lrpe = self.lrpe[:layers] if isinstance(self.lrpe, list) else self.lrpe
        return dataclasses.replace(self, layers=layers, lrpe=lrpe)

    def problems(self, tp: int = 1) -> list[str]:
        """One line for each setting out of bounds, and for each relation between the model's settings, or to `tp`
        tensor-parallel ranks, that does not hold."""
        out = out_of_bounds(self, "model.")
        return [*out.values(), *RELATIONS.broken(out, self, tp)]


RELATIONS = Relations()


@RELATIONS.reads("model.embed_dim", "model.heads")
def _width_is_divided_over_heads(model: ModelConfig, tp: int) -> Iterator[str]:
    if model.embed_dim % model.heads:
        yield f"model.embed_dim={model.embed_dim} is not divisible by model.heads={model.heads}"


@RELATIONS.reads("model.layers")
def _lrpe_is_said_of_every_layer(model: ModelConfig, tp: int) -> Iterator[str]:
    if isinstance(model.lrpe, list) and len(model.lrpe) != model.layers:
        yield f"model.lrpe has {len(model.lrpe)} entries but model.layers={model.layers}"


@RELATIONS.reads("model.vocab_size", "model.pad_id", "model.bos_id", "model.eos_id")
def _special_tokens_are_in_the_vocabulary(model: ModelConfig, tp: int) -> Iterator[str]:
    for name in ("pad_id", "bos_id", "eos_id"):
        if getattr(model, name) >= model.vocab_size:
            yield f"model.{name}={getattr(model, name)} is not below model.vocab_size={model.vocab_size}"


@RELATIONS.reads("model.heads", "model.glu_dim", "parallel.tp")
def _heads_and_glu_are_split_over_ranks(model: ModelConfig, tp: int) -> Iterator[str]:
    if model.heads % tp:
        yield f"model.heads={model.heads} is not divisible by parallel.tp={tp}"
    if model.glu_dim < tp:
        yield f"model.glu_dim={model.glu_dim} is smaller than parallel.tp={tp}"


# What the Transformer has; and settings of linear attention, which do not change it, so another value is refused.
TRANSFORMER = {"absolute_positions": False, "norm": "rmsnorm", "glu_act": "silu", "scale_embedding": False}
LINEAR_ATTENTION = ("act", "gate", "lrpe", "decay", "decay_temperature")


@RELATIONS.reads()
def _a_transformer_has_no_linear_attention(model: ModelConfig, tp: int) -> Iterator[str]:
    if model.architecture != "transformer":
        return
    plain = ModelConfig()
    for name, needed in (TRANSFORMER | {name: getattr(plain, name) for name in LINEAR_ATTENTION}).items():
        if getattr(model, name) != needed:
            yield (
                f"model.{name}={getattr(model, name)} is a variant of TransNormerLLM: model.architecture=transformer "
                f"has model.{name}={needed}"
            )


@RELATIONS.reads("model.embed_dim", "model.heads")
def _rope_pairs_channels(model: ModelConfig, tp: int) -> Iterator[str]:
    if model.architecture == "transformer" and model.embed_dim % model.heads == 0 and model.head_dim % 2:
        yield (
            f"model.embed_dim={model.embed_dim} / model.heads={model.heads} = {model.head_dim} must be even: RoPE "
            "rotates pairs of channels"
        )
