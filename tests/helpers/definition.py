"""The models as equations, in fp64 and at quadratic cost: no chunk, no state, no kernel of the product."""

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
        x = x + MIXERS[config.mixers[layer]](config, layer, own, norm(config, own, "token_norm", x), place)
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
    """Of TransNormerLLM; and of TransNormer, which has no u."""
    kind = "qkvu" if config.mixers[layer] == "linear" else "qkv"
    q, k, v, *u = heads_of(config, x @ weights[f"token_mixer.{kind}_proj.weight"].T, len(kind))
    scores = torch.einsum("bhtd,bhsd->bhtsd", ACTIVATIONS[config.act](q), ACTIVATIONS[config.act](k))
    distance = place[:, None] - place
    if config.lrpe_layers[layer]:  # cos a cos b + sin a sin b = cos(a - b)
        scores = scores * torch.cos(weights["token_mixer.lrpe.theta"][:, None] * distance[..., None])
    rates = torch.tensor(all_decay_rates(config)[layer], dtype=torch.float32).double()  # the model's rates are fp32
    decay = torch.exp(-rates.view(-1, 1, 1) * distance.clamp(min=0)) * (distance >= 0)
    o = (scores.sum(-1) * decay) @ v
    o = norm(config, weights, "token_mixer.norm", o.transpose(1, 2).flatten(2))
    y = o * u[0].transpose(1, 2).flatten(2) if config.gate else o
    return y @ weights["token_mixer.out_proj.weight"].T


def cosine_attention(
    config: ModelConfig, layer: int, weights: Mapping[str, Tensor], x: Tensor, place: Tensor
) -> Tensor:
    q, k, v = (
        torch.relu(y) if at < 2 else y
        for at, y in enumerate(heads_of(config, x @ weights["token_mixer.qkv_proj.weight"].T, 3))
    )
    distance = place[:, None] - place
    weight = (q @ k.mT) * torch.cos(math.pi / 2 * distance / config.max_length) * (distance >= 0)
    y = weight @ v / weight.sum(-1, keepdim=True).clamp(min=config.norm_eps)
    return y.transpose(1, 2).flatten(2) @ weights["token_mixer.out_proj.weight"].T


def softmax_attention(
    config: ModelConfig, layer: int, weights: Mapping[str, Tensor], x: Tensor, place: Tensor
) -> Tensor:
    """Of all tokens so far, or of those in the same block."""
    q, k, v = (heads_of(config, x @ weights[f"token_mixer.{name}_proj.weight"].T, 1)[0] for name in "qkv")
    angle = place[:, None] * config.rope_base ** (-torch.arange(0, config.head_dim, 2).double() / config.head_dim)
    turn = torch.polar(torch.ones_like(angle), angle)
    half = config.head_dim // 2
    q, k = (torch.view_as_complex(torch.stack([y[..., :half], y[..., half:]], -1)) * turn for y in (q, k))
    scores = (q @ k.mH).real / math.sqrt(config.head_dim)
    hidden = place[:, None] < place
    if config.mixers[layer] == "block":
        block = place // config.block_length
        hidden = hidden | (block[:, None] != block)
    y = scores.masked_fill(hidden, -math.inf).softmax(-1) @ v
    return y.transpose(1, 2).flatten(2) @ weights["token_mixer.out_proj.weight"].T


MIXERS = {
    "linear": linear_attention,
    "norm": linear_attention,
    "cosine": cosine_attention,
    "softmax": softmax_attention,
    "block": softmax_attention,
}


def heads_of(config: ModelConfig, fused: Tensor, blocks: int) -> tuple[Tensor, ...]:
    """[B, N, blocks x D] -> that many [B, H, N, d]."""
    return fused.unflatten(-1, (blocks, config.heads, config.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
