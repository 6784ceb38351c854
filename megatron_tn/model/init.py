"""Initial values, the same at every tensor-parallel size: each logical parameter is drawn whole, from a generator
seeded by the run's seed and the parameter's name, and every rank keeps its part."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from megatron_tn.config import ModelConfig
from megatron_tn.model.transnormer import TransNormerLM


def initial_value(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Tensor:
    """The whole logical parameter `name`, fp32 on the CPU: N(0, init_std), with the pad row of the embedding zero."""
    if name.endswith("norm.weight"):
        return torch.ones(shape, device="cpu")
    if name.endswith("lrpe.theta"):
        # 10000^(-2j/D), j counted across heads, so that every head gets its own band of frequencies.
        j = torch.arange(config.embed_dim, dtype=torch.float64, device="cpu")
        return (10000 ** (-2 * j / config.embed_dim)).float().view(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    value = torch.empty(shape, device="cpu").normal_(0.0, config.init_std, generator=generator)
    if name == "model.embed_tokens.weight":
        value[config.pad_id] = 0
    return value


@torch.no_grad()
def initialize(model: TransNormerLM, seed: int) -> None:
    """Fill every parameter of `model` with its part of the initial value."""
    axis = model.context.tp
    for name, parameter in model.named_parameters():
        spec = parameter.shard_spec
        parameter.copy_(spec.take(initial_value(name, spec.shape, model.config, seed), axis.rank, axis.size))
