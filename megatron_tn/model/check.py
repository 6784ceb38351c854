"""Self-check of a model's GPU operators against fp64 references, before training and before decoding."""

from collections.abc import Iterator
from typing import Any

import torch

from kernels import StepSizes, decoding_check, self_check
from megatron_tn.config import ModelConfig, TrainConfig
from megatron_tn.config.model import SOFTMAX_KINDS
from megatron_tn.model.base import Model
from megatron_tn.model.cosine_attention import MORE_COLUMNS
from megatron_tn.parallel.embedding import padded_vocab
from megatron_tn.parallel.fp8_weights import keeps_fp8

# model.norm -> its operators. After linear attention, whose output lacks its norm's scale, RMSNorm is
# add_scaled_simple_rms_norm times the weight.
NORM_OPERATORS = {
    "simplermsnorm": {"simple_rms_norm", "add_simple_rms_norm", "add_scaled_simple_rms_norm"},
    "rmsnorm": {"rms_norm", "add_rms_norm", "add_scaled_simple_rms_norm"},
    "layernorm": set(),
}

# Of decoding: configuration, tp, type, device, whether weights are in fp8.
_checked: set[tuple[str, int, torch.dtype, torch.device, bool]] = set()


def check_kernels(model: Model, device: torch.device, dtype: torch.dtype, run: TrainConfig) -> None:
    """Compare the operators of the model and of the optimizer, in `dtype` and at this rank's widths, with their fp64
    references, by the kernels that Triton compiles for the microbatches of `run`. Does nothing on a CPU. PyTorch's
    attention is not checked. The ranks of a machine check the operators in different orders, so that they compile
    different kernels, which Triton's cache then has for all of them.

    If a Triton kernel is wrong, the mismatch is logged and all operators fall back to plain PyTorch.

    Raises:
        KernelMismatchError: an operator's plain PyTorch implementation is wrong, too.
    """
    if device.type != "cuda":
        return
    config, tp = model.config, model.context.tp.size
    float8 = any(getattr(module, "float8", None) is not None for module in model.modules())
    order, packed, kinds = device.index or 0, run.data.isolate_documents, list(attentions(config))
    for of_attention in reversed(kinds) if order % 2 else kinds:
        sizes = StepSizes(
            heads=config.heads // tp,
            glu_width=config.glu_dim // tp,
            dtype=dtype,
            device=device,
            embed_width=config.embed_dim,
            glu_act=config.glu_act,
            float8=float8,
            batch=1 if packed else run.data.micro_batch,
            length=-(-run.data.sequence_length // run.parallel.cp) * (run.data.micro_batch if packed else 1),
            packed=packed,
            vocabulary=padded_vocab(config.vocab_size, tp) // tp,
            **of_attention,
        )
        self_check(sizes, unused=unused(config, run.optim.name), fall_back=True, order=order)


def check_decoding_kernels(model: Model) -> None:
    """`check_kernels` for the operators of decoding steps, once a process for each configuration."""
    config, tp, weight = model.config, model.context.tp.size, next(model.parameters())
    float8 = keeps_fp8(model)
    key = (repr(config), tp, weight.dtype, weight.device, float8)
    if not weight.is_cuda or key in _checked:
        return
    for of_attention in attentions(config):
        decoding_check(
            heads=config.heads // tp,
            key_width=of_attention["key_width"],
            value_width=of_attention["value_width"],
            glu_width=config.glu_dim // tp,
            embed_width=config.embed_dim,
            dtype=weight.dtype,
            device=weight.device,
            act=of_attention.get("act", "silu"),
            glu_act=config.glu_act,
            linear="rope_base" not in of_attention,
            float8=float8,
            fall_back=True,
        )
    _checked.add(key)


def unused(config: ModelConfig, optimizer: str) -> set[str]:
    """Operators of `self_check` that no step of this model with `optimizer` calls."""
    found = set().union(*NORM_OPERATORS.values()) - NORM_OPERATORS[config.norm]
    if set(config.mixers) <= set(SOFTMAX_KINDS):
        found.add("add_scaled_simple_rms_norm")
    return found if optimizer == "muon" else found | {"muon_", "gram_polynomial"}


def attentions(config: ModelConfig) -> Iterator[dict[str, Any]]:
    """For each kind of attention in the layers, the sizes of `self_check` that it determines."""
    d = config.head_dim
    for kind, lrpe in dict.fromkeys(zip(config.mixers, config.lrpe_layers, strict=True)):
        if kind in ("softmax", "block"):
            yield {"key_width": d, "value_width": d, "rope_base": config.rope_base}
        elif kind == "cosine":
            width = d + MORE_COLUMNS
            yield {"key_width": 2 * width, "value_width": width, "act": "relu", "theta_learnt": False}
        else:
            yield {"key_width": d * (2 if lrpe else 1), "value_width": d, "act": config.act}
