"""Self-check of the architectures' GPU operators against fp64 references, before training."""

from __future__ import annotations

import torch

from kernels import self_check
from megatron_tn.model.base import Model


def check_kernels(model: Model, device: torch.device, dtype: torch.dtype) -> None:
    """Compare the operators, in `dtype` and at this rank's widths, with their fp64 references. Does nothing
    on a CPU.

    If a Triton kernel is wrong, the mismatch is logged and all operators fall back to plain PyTorch.

    Raises:
        KernelMismatchError: an operator's plain PyTorch implementation is wrong, too.
    """
    if device.type != "cuda":
        return
    config, tp = model.config, model.context.tp.size
    for key_width in {config.head_dim * (2 if lrpe else 1) for lrpe in config.lrpe_layers}:
        self_check(
            heads=config.heads // tp,
            key_width=key_width,
            value_width=config.head_dim,
            glu_width=config.glu_dim // tp,
            dtype=dtype,
            device=device,
            embed_width=config.embed_dim,
            act=config.act,
            glu_act=config.glu_act,
            fall_back=True,
        )


def check_transformer_kernels(model: Model, device: torch.device, dtype: torch.dtype) -> None:
    """`check_kernels` of the Transformer's operators. PyTorch's attention is not checked."""
    if device.type != "cuda":
        return
    config, tp = model.config, model.context.tp.size
    self_check(
        heads=config.heads // tp,
        key_width=config.head_dim,
        value_width=config.head_dim,
        glu_width=config.glu_dim // tp,
        dtype=dtype,
        device=device,
        embed_width=config.embed_dim,
        glu_act=config.glu_act,
        rope_base=config.rope_base,
        fall_back=True,
    )
