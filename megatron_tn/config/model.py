"""The settings `model.*`: shape and variant of a TransNormerLLM, or of a model that it is compared with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic.dataclasses import dataclass

from megatron_tn.config.bounds import AboveZero, Bounds, Count, FromZero, Positive, Relations, out_of_bounds
from megatron_tn.config.mapping import STRICT

# Largest extents: a model that a damaged or hostile file describes is refused before it is built.
Vocabulary = Annotated[int, Bounds(1, 2**32)]  # the widest token that shards can hold
Width = Annotated[int, Bounds(1, 2**24)]
NUMBER = Bounds(1, 2**11)
Number = Annotated[int, NUMBER]
Act = Literal["silu", "none", "1+elu", "relu"]  # activation functions, of kernels/activations


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """Shape and variant of a TransNormerLLM (arXiv 2307.14995), with the released family's semantics as defaults; or of
    a Transformer, a cosFormer (arXiv 2202.08791) or a TransNormer (arXiv 2210.10340), as files of conf/model have
    them."""

    name: str = "385m"  # name of the model in reports and comparisons of runs
    # Name in megatron_tn.model.registry. transnormer: TransNormerLLM; transnormer_2022: TransNormer, its predecessor.
    architecture: Literal["transnormer", "transformer", "cosformer", "transnormer_2022"] = "transnormer"
    # V, rows of the embedding: at least the tokenizer's entries; padded to a multiple of parallel.tp as needed.
    vocab_size: Vocabulary = 64000
    embed_dim: Width = 1024  # D, width of the residual stream
    layers: Number = 24  # L, number of blocks
    heads: Number = 8  # H, attention heads; the released sizes have D / H = 128
    glu_dim: Width = 2816  # F, width of the feed-forward layer SGLU (about 8/3 D)
    # true: x = E[ids] * sqrt(D); false: x = E[ids], as in the released 3B and larger models.
    scale_embedding: bool = True
    # true: add sinusoids of the position to x, as in arXiv 1706.03762 (an ablation); false: add nothing.
    absolute_positions: bool = False
    # normalisation before every sublayer; simplermsnorm is rmsnorm without weights.
    norm: Literal["simplermsnorm", "rmsnorm", "layernorm"] = "simplermsnorm"
    # Added under the root: to the mean square of rmsnorm and simplermsnorm, to the variance of layernorm.
    norm_eps: FromZero = 1e-6
    # transnormer: token mixers of the layers, a pattern that is repeated over depth, such as [linear, linear, linear,
    # softmax]; [linear]: linear attention in every layer.
    attention: list[Literal["linear", "softmax"]] = dataclasses.field(default_factory=lambda: ["linear"])
    # activation function of q and k; none: the identity; 1+elu: 1 + elu(x).
    act: Act = "silu"
    # activation function of SGLU's gate; none: the identity, as in TransNormerLLM.
    glu_act: Act = "none"
    gate: bool = True  # true: the token mixer's output is multiplied by a gate u, linear in x; false: there is no u
    # first, all, none, or a list of one bool per layer: the layers whose q and k get LRPE (linearised relative
    # positional encoding). first: layer 0 alone.
    lrpe: Literal["first", "all", "none"] | list[bool] = "first"
    # formula of the decay rates, one rate per head (megatron_tn/model/decay.py). released: that of the released
    # weights; paper: equation 10 of arXiv 2307.14995; none: no decay.
    decay: Literal["released", "paper", "none"] = "released"
    # true: decay rates fall with depth, in layer l by a factor of 1 - l/(L-1) (decay=paper: 1 - l/L); false: they are
    # equal in all layers.
    decay_temperature: bool = True
    # Softmax attention: RoPE turns channel pair j of d / 2 by base^(-2 j / d) radians per position.
    rope_base: AboveZero = 10000.0
    # transnormer_2022: tokens of a block; softmax attention of the lower layers stays within it.
    block_length: Positive = 64
    # cosformer: M >= 1, the longest sequence, since the weights cos(pi/2 (t - s) / M) are negative past it; 0 for the
    # other architectures, which have no such limit.
    max_length: Count = 0
    init_std: FromZero = 0.02  # standard deviation of the normal distribution that initial matrices are drawn from
    pad_id: Count = 0  # id of the padding token; training reads pad_id, bos_id and eos_id from data.manifest instead
    bos_id: Count = 1  # id of the token that begins a document; training reads it from data.manifest instead
    eos_id: Count = 2  # id of the token that ends a document; training reads it from data.manifest instead

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.heads

    @property
    def mixers(self) -> list[str]:
        """[L]: the kind of each layer's token mixer, a key of megatron_tn.model.mixers."""
        if self.architecture == "transnormer_2022":
            lower = self.layers // 2
            return ["block"] * lower + ["norm"] * (self.layers - lower)
        pattern = {"transformer": ["softmax"], "cosformer": ["cosine"]}.get(self.architecture, self.attention)
        return [pattern[layer % len(pattern)] for layer in range(self.layers)]

    @property
    def lrpe_layers(self) -> list[bool]:
        """[L]: whether each layer applies LRPE; layers of other attention never do."""
        wanted = {"first": [layer == 0 for layer in range(self.layers)], "all": [True] * self.layers}
        flags = self.lrpe if isinstance(self.lrpe, list) else wanted.get(self.lrpe, [False] * self.layers)
        return [flag and kind in WITH_LRPE for flag, kind in zip(flags, self.mixers, strict=True)]

    def shortened(self, layers: int) -> ModelConfig:
        lrpe = self.lrpe[:layers] if isinstance(self.lrpe, list) else self.lrpe
        return dataclasses.replace(self, layers=layers, lrpe=lrpe, attention=self.attention[:layers])

    def problems(self, tp: int = 1) -> list[str]:
        """One line for each setting out of bounds, and for each relation between the model's settings, or to `tp`
        tensor-parallel ranks, that does not hold."""
        out = out_of_bounds(self, "model.")
        return [*out.values(), *RELATIONS.broken(out, self, tp)]


WITH_LRPE = ("linear", "norm")  # kinds of token mixers
SOFTMAX_KINDS = ("softmax", "block")  # kinds of softmax attention, with RoPE
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


@RELATIONS.reads("model.layers")
def _the_pattern_of_attention_fits_into_the_layers(model: ModelConfig, tp: int) -> Iterator[str]:
    if not 1 <= len(model.attention) <= model.layers:
        yield f"model.attention has {len(model.attention)} entries, but must have 1 to model.layers={model.layers}"


# What an architecture has, settings included that do not change it: another value would say that they do.
LINEAR_ATTENTION = ("attention", "act", "gate", "lrpe", "decay", "decay_temperature")
PLAIN = {name: getattr(ModelConfig(), name) for name in LINEAR_ATTENTION}
HAS = {
    "transformer": PLAIN
    | {"absolute_positions": False, "norm": "rmsnorm", "glu_act": "silu", "scale_embedding": False},
    "cosformer": PLAIN | {"act": "relu", "gate": False, "lrpe": "none", "decay": "none"},
    "transnormer_2022": {"attention": PLAIN["attention"], "gate": False, "decay": "none"},
}


@RELATIONS.reads()
def _other_architectures_have_no_variants_of_linear_attention(model: ModelConfig, tp: int) -> Iterator[str]:
    for name, needed in HAS.get(model.architecture, {}).items():
        if getattr(model, name) != needed:
            yield (
                f"model.{name}={getattr(model, name)} is a variant of TransNormerLLM: model.architecture="
                f"{model.architecture} has model.{name}={needed}"
            )


@RELATIONS.reads("model.max_length")
def _cosformer_alone_is_built_for_a_length(model: ModelConfig, tp: int) -> Iterator[str]:
    if (model.architecture == "cosformer") != (model.max_length > 0):
        needed = "at least 1: the length that it is built for" if model.max_length == 0 else "0"
        yield (
            f"model.max_length={model.max_length}, but model.architecture={model.architecture} has model.max_length="
            f"{needed}"
        )


@RELATIONS.reads("model.embed_dim", "model.heads", "model.layers")
def _rope_pairs_channels(model: ModelConfig, tp: int) -> Iterator[str]:
    rotated = model.attention and set(model.mixers) & set(SOFTMAX_KINDS)
    if rotated and model.embed_dim % model.heads == 0 and model.head_dim % 2:
        yield (
            f"model.embed_dim={model.embed_dim} / model.heads={model.heads} = {model.head_dim} must be even: RoPE "
            "rotates pairs of channels"
        )
