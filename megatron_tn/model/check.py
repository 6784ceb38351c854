"""The kernels judged at this model's own shapes, on this device, before they are trusted with a run."""

from __future__ import annotations

import torch

from kernels import self_check
from megatron_tn.model.transnormer import TransNormerLM


def check_kernels(model: TransNormerLM, device: torch.device, dtype: torch.dtype) -> None:
    """Compare the operators with their fp64 definitions at the widths and in the type of this rank; on a GPU alone.

    A kernel that is wrong here is logged, and all operators run in plain PyTorch instead.

    Raises:
        KernelMismatchError: the plain form is wrong as well.
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
            fall_back=True,
        )
