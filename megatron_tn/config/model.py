"""The settings `model.*`: shape and variant of a TransNormerLLM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic.dataclasses import dataclass

from megatron_tn.config.bounds import Bounds, Count, FromZero, Relations, out_of_bounds
from megatron_tn.config.mapping import STRICT

# Largest extents: a model that a damaged or hostile file describes is refused before it is built.
Vocabulary = Annotated[int, Bounds(1, 2**32)]  # the widest token that shards can hold
Width = Annotated[int, Bounds(1, 2**24)]
NUMBER = Bounds(1, 2**11)
Number = Annotated[int, NUMBER]


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """Shape and variant of a TransNormerLLM (arXiv 2307.14995). The defaults are the released family's semantics."""

    name: str = "385m"  # of the size, for reports
    architecture: Literal["transnormer"] = "transnormer"  # of megatron_tn.model.registry
    vocab_size: Vocabulary = 64000  # V, entries of the tokenizer; the vocabulary-parallel embedding pads it by itself
    embed_dim: Width = 1024  # D
    layers: Number = 24  # L
    heads: Number = 8  # H; the released sizes have D / H = 128
    glu_dim: Width = 2816  # F
    scale_embedding: bool = True  # x = E[ids] * sqrt(D); the released 3B and larger models have x = E[ids]
    norm: Literal["simplermsnorm", "rmsnorm"] = "simplermsnorm"
    norm_eps: FromZero = 1e-6  # added to the mean square under the root
    act: Literal["silu", "none", "1+elu"] = "silu"  # of q and k
    glu_act: Literal["none", "silu"] = "none"
    gate: bool = True  # the output gate u of the token mixer
    lrpe: Literal["first", "all", "none"] | list[bool] = "first"  # the layers that apply LRPE
    decay: Literal["released", "paper", "none"] = "released"  # form of the decay rates, one a head
    decay_temperature: bool = True  # the factor 1 - l/(L-1) of layer l's decay rates
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
