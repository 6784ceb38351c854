"""The models as equations, in fp64 and at quadratic cost: no chunk, no state, no kernel of the product."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, elu, silu

from megatron_tn.config import ModelConfig
from megatron_tn.model.decay import all_decay_rates

ACTIVATIONS = {"silu": silu, "none": lambda x: x, "1+elu": lambda x: 1 + elu(x), "relu": torch.relu}


def definition_gradients(
    config: ModelConfig, weights: Mapping[str, Tensor], tokens: Tensor, targets: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss over targets != -100, and the gradient of every parameter; weights: released name -> whole tensor."""
    weights = {name: weight.detach().double().requires_grad_() for name, weight in weights.items()}
    logits = definition_logits(config, weights, tokens)
    loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    return loss.detach(), {name: weight.grad for name, weight in weights.items()}


def definition_logits(config: ModelConfig, weights: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """tokens [B, N], one document a row -> logits [B, N, V]."""
    embedding = weights["model.embed_tokens.weight"]
    place = torch.arange(tokens.shape[1], dtype=torch.float64)
    x = embedding[tokens] * (math.sqrt(config.embed_dim) if config.scale_embedding else 1)
    if config.absolute_positions:
        angle = place[:, None] * 10000 ** (-torch.arange(0, config.embed_dim, 2).double() / config.embed_dim)
        x = x + torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)
    for layer in range(config.layers):
        own = {name.removeprefix(f"model.layers.{layer}."): value for name, value in weights.items()}
        x = x + linear_attention(config, layer, own, norm(config, own, "token_norm", x), place)
        y = norm(config, own, "channel_norm", x)
        first, second = y @ own["channel_mixer.l1.weight"].T, y @ own["channel_mixer.l2.weight"].T
        x = x + (ACTIVATIONS[config.glu_act](first) * second) @ own["channel_mixer.l3.weight"].T
    return norm(config, weights, "model.final_norm", x) @ embedding.T


def norm(config: ModelConfig, weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    if config.norm == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    x = x / torch.sqrt(x.square().mean(-1, keepdim=True) + config.norm_eps)
    if config.norm != "simplermsnorm":
        x = x * weights[f"{name}.weight"]
    return x + weights[f"{name}.bias"] if config.norm == "layernorm" else x


def linear_attention(
    config: ModelConfig, layer: int, weights: Mapping[str, Tensor], x: Tensor, place: Tensor
) -> Tensor:
    q, k, v, u = heads_of(config, x @ weights["token_mixer.qkvu_proj.weight"].T, 4)
    scores = torch.einsum("bhtd,bhsd->bhtsd", ACTIVATIONS[config.act](q), ACTIVATIONS[config.act](k))
    distance = place[:, None] - place
    if config.lrpe_layers[layer]:  # cos a cos b + sin a sin b = cos(a - b)
        scores = scores * torch.cos(weights["token_mixer.lrpe.theta"][:, None] * distance[..., None])
    rates = torch.tensor(all_decay_rates(config)[layer], dtype=torch.float32).double()  # the model's rates are fp32
    decay = torch.exp(-rates.view(-1, 1, 1) * distance.clamp(min=0)) * (distance >= 0)
    o = (scores.sum(-1) * decay) @ v
    o, u = (y.transpose(1, 2).flatten(2) for y in (o, u))
    o = norm(config, weights, "token_mixer.norm", o)
    return (o * u if config.gate else o) @ weights["token_mixer.out_proj.weight"].T


def heads_of(config: ModelConfig, fused: Tensor, blocks: int) -> tuple[Tensor, ...]:
    """[B, N, blocks x D] -> that many [B, H, N, d]."""
    return fused.unflatten(-1, (blocks, config.heads, config.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
