"""Small models, batches and references that many tests share."""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_tn.config import DataConfig, EngineConfig, ModelConfig, OptimConfig, TrainConfig
from megatron_tn.model.base import Model
from megatron_tn.model.init import initialize
from megatron_tn.model.registry import build_model

# Eight heads and a GLU width of 96 divide by every tensor-parallel size up to 8; 101 does not, so rows are padded.
# One layer has LRPE and one has not; one decays fast and one hardly.
TINY = ModelConfig(name="tiny", vocab_size=101, embed_dim=64, layers=2, heads=8, glu_dim=96, init_std=0.05)
# The same shape as a Transformer.
TRANSFORMER = dataclasses.replace(
    TINY, name="tiny transformer", architecture="transformer", norm="rmsnorm", glu_act="silu", scale_embedding=False
)
HYBRID = dataclasses.replace(TINY, name="tiny hybrid", attention=["linear", "softmax"], lrpe="all")
COSFORMER = dataclasses.replace(
    TINY,
    name="tiny cosformer",
    architecture="cosformer",
    max_length=24,
    act="relu",
    gate=False,
    lrpe="none",
    decay="none",
    norm="rmsnorm",
    glu_act="silu",
)
TRANSNORMER_2022 = dataclasses.replace(
    TINY,
    name="tiny transnormer",
    architecture="transnormer_2022",
    block_length=4,
    act="1+elu",
    gate=False,
    lrpe="all",
    decay="none",
    norm="rmsnorm",
    glu_act="silu",
)


class Rows(NamedTuple):
    """A microbatch."""

    tokens: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None = None

    @property
    def target_tokens(self) -> int:
        return int((self.targets != -100).sum())

    @property
    def samples(self) -> int:
        return self.tokens.shape[0]

    @property
    def pad(self) -> int:
        return 0


def tiny_config(**changes) -> TrainConfig:
    """A TrainConfig around TINY. `changes`: model, parallel, ... as whole dataclasses, or fields of the top level."""
    defaults = {
        "model": TINY,
        "engine": EngineConfig(name="local", precision="fp32"),
        "data": DataConfig(sequence_length=24, global_batch=4, micro_batch=1),
        "optim": OptimConfig(lr=1e-2, clip_norm=1.0),
    }
    return dataclasses.replace(TrainConfig(), **(defaults | changes))


def random_batch(
    rows: int, length: int, config: ModelConfig = TINY, seed: int = 0, ignored: float = 0.2
) -> tuple[Tensor, Tensor]:
    """tokens, targets [rows, length]; a share of the targets is ignored, unevenly over rows."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, config.vocab_size, (rows, length + 1), generator=draw)
    targets = ids[:, 1:].clone()
    share = torch.linspace(0, 2 * ignored, rows).unsqueeze(1)
    targets[torch.rand(targets.shape, generator=draw) < share] = -100
    return ids[:, :-1].contiguous(), targets


def reference_model(config: ModelConfig, seed: int, dtype: torch.dtype = torch.float64) -> Model:
    """One process, whole model, in fp64."""
    model = build_model(config, None, "cpu", dtype)
    initialize(model, seed)
    return model


def reference_gradients(
    config: ModelConfig, seed: int, tokens: Tensor, targets: Tensor, dtype: torch.dtype = torch.float64
) -> tuple[float, dict[str, Tensor]]:
    """Loss and every gradient of one process over the whole batch."""
    model = reference_model(config, seed, dtype)
    loss = model.loss(tokens, targets)
    loss.backward()
    return loss.item(), model.named_logical_gradients()


def relative_errors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Per parameter, ||found - wanted|| / ||wanted||; one under 1e-6 of the largest norm is compared to that. Infinity
    where a gradient is not finite: NaN may be passed over by max()."""
    floor = 1e-6 * max(value.norm().item() for value in wanted.values())
    assert found.keys() == wanted.keys()
    errors = {
        name: ((found[name].double() - value.double()).norm() / max(value.norm().item(), floor)).item()
        for name, value in wanted.items()
    }
    return {name: error if error == error else float("inf") for name, error in errors.items()}
