"""Registry of architectures: the values of `model.architecture` and their functions.

To add an architecture: a module with its `Body`, initial values and FLOP formula, an entry in ARCHITECTURES, its name
in `ModelConfig.architecture`, and its own settings in `ModelConfig`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron_tn.config import ConfigError, ModelConfig, TrainConfig
from megatron_tn.model import check, decoder, decoding, flops, transformer, transnormer
from megatron_tn.model.base import Model
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.parallel.sharding import Box


@dataclass(frozen=True)
class ReleasedNames:
    """Names of an architecture in released (Hugging Face) files.

    model_type, class_name: fields `model_type` and `architectures` of config.json.
    repeated: extra tensor that a file may hold -> the tensor of which it is a copy (tied weights).
    renamed: part of a parameter's dotted name -> the same part of the tensor's name; other parts are equal.
    """

    model_type: str
    class_name: str
    repeated: Mapping[str, str]
    renamed: Mapping[str, str] = field(default_factory=dict)

    def tensor(self, parameter: str) -> str:
        """The name of the parameter's tensor."""
        return ".".join(self.renamed.get(part, part) for part in parameter.split("."))


@dataclass(frozen=True)
class FusedToken:
    """A forward pass of one token a row by operators made for it, faster than the model's own.

    serves(model, rows): whether it computes this model's function for so many rows.
    logits(model, tokens, positions, states): tokens and positions int64 [B], states as of `Body.initial_state`, which
        become those after the tokens -> logits [B, V].
    """

    serves: Callable[[Model, int], bool]
    logits: Callable[[Model, Tensor, Tensor, list[Tensor]], Tensor]


@dataclass(frozen=True)
class Architecture:
    """One family of models.

    build(config, context): the model with this rank's part of the parameters, on the default device and dtype.
    problems(config, tp): one line for each violated relation between settings. `ModelConfig.problems` has the relations
        that need no model, and is called before a run builds anything.
    parameter_count(config): parameters of the whole model, a tied weight once, without padding.
    forward_flops_per_token(config, sequence_length): operations of one token's forward pass by part of the model, the
        mean over a sequence; a multiply-add counts as two.
    initial_box(name, shape, box, config, seed): initial values within `box` of the logical parameter `name` of
        `shape`, fp32 on the CPU.
    fused_token: a faster forward pass of a decoding step; None: there is none.
    check_kernels(model, device, dtype, run): compares the operators of the model and of its optimizer with fp64
        references, at this rank's shapes in `run`.
    released: None for an architecture that no released layout can say.
    """

    build: Callable[[ModelConfig, ParallelContext], Model]
    released: ReleasedNames | None
    problems: Callable[[ModelConfig, int], list[str]] = ModelConfig.problems
    parameter_count: Callable[[ModelConfig], int] = flops.parameter_count
    forward_flops_per_token: Callable[[ModelConfig, int], dict[str, int]] = flops.forward_flops_per_token
    initial_box: Callable[[str, tuple[int, ...], Box, ModelConfig, int], Tensor] = decoder.initial_box
    check_kernels: Callable[[Model, torch.device, torch.dtype, TrainConfig], None] = check.check_kernels
    fused_token: FusedToken | None = None


TRANSNORMER = Architecture(
    build=transnormer.build,
    initial_box=transnormer.initial_box,
    released=ReleasedNames(
        model_type="transnormer",
        class_name="TransnormerForCausalLM",
        repeated={"lm_head.weight": "model.embed_tokens.weight"},
    ),
    fused_token=FusedToken(decoding.serves, decoding.token_logits),
)

ARCHITECTURES = {
    "transnormer": TRANSNORMER,
    # The same body with the token mixers of arXiv 2202.08791 and 2210.10340.
    "cosformer": replace(TRANSNORMER, released=None, fused_token=None),
    "transnormer_2022": replace(TRANSNORMER, released=None, fused_token=None),
    "transformer": Architecture(
        build=transformer.build,
        released=ReleasedNames(
            model_type="llama",
            class_name="LlamaForCausalLM",
            repeated={"lm_head.weight": "model.embed_tokens.weight"},
            renamed=transformer.LLAMA_NAMES,
        ),
    ),
}


def architecture(config: ModelConfig) -> Architecture:
    return ARCHITECTURES[config.architecture]


def build_model(
    config: ModelConfig,
    context: ParallelContext | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Model:
    """A model with parameters allocated on `device` in `dtype`, but uninitialised: call `init.initialize` afterwards.

    context: the ranks that determine this process's part of the parameters; None for a single process.

    Raises:
        ConfigError: settings that do not fit each other or context.tp, one line each.
    """
    context = context or ParallelContext()
    family = architecture(config)
    if problems := family.problems(config, context.tp.size):
        raise ConfigError(problems)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return family.build(config, context)
    finally:
        torch.set_default_dtype(before)


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the whole model, a tied weight once, without padding."""
    return architecture(config).parameter_count(config)


def norm_bound(config: ModelConfig) -> float | None:
    """A bound of the elements that the blocks' norms give out; None where a learnt weight scales them."""
    return 1.01 * math.sqrt(config.embed_dim) if config.norm == "simplermsnorm" else None  # 1.01: they are rounded


def forward_flops_per_token(config: ModelConfig, sequence_length: int) -> dict[str, int]:
    """Part of the model -> FLOPs of one token's forward pass."""
    return architecture(config).forward_flops_per_token(config, sequence_length)


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """FLOPs of one token's forward and backward pass: 3 x forward, since the backward of a product is two products of
    the same size. Recomputation is not counted."""
    return 3 * sum(forward_flops_per_token(config, sequence_length).values())


def problems_of_export(config: ModelConfig) -> list[str]:
    """Reasons why no released layout can represent this model, one line each."""
    if architecture(config).released is None:
        return [f"model.architecture={config.architecture} has no released layout, so it cannot be exported"]
    if config.architecture == "transnormer" and set(config.mixers) != {"linear"}:
        return [
            f"model.attention=[{', '.join(config.attention)}] cannot be exported: the released layout has linear "
            "attention in every layer"
        ]
    return []


def check_kernels(model: Model, device: torch.device, dtype: torch.dtype, run: TrainConfig) -> None:
    """Compare the operators of `model` and of its optimizer with their fp64 references, at this rank's shapes in `run`
    and in `dtype`.

    Raises:
        KernelMismatchError: an operator's plain PyTorch implementation is wrong, too.
    """
    architecture(model.config).check_kernels(model, device, dtype, run)


def check_decoding_kernels(model: Model) -> None:
    """`check_kernels` for the operators of decoding steps, once a process for each configuration."""
    check.check_decoding_kernels(model)
