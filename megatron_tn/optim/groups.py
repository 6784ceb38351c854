"""Optimizer parameter groups: with and without weight decay, the embedding, and for Muon the blocks' matrices."""

from collections.abc import Iterable

import torch
from torch import Tensor

from megatron_tn.config import OptimConfig

MATRICES = "matrices"  # key of a parameter group: whether Muon updates its parameters
LR_RATIO = "lr_ratio"  # key of a parameter group: its learning rate / optim.lr's, 1 without the key


def is_decayed(name: str, dimensions: int) -> bool:
    """Weight decay applies to matrices, not to norm weights (scales) or LRPE's theta (frequencies)."""
    return dimensions == 2 and not name.endswith(".theta")


def is_block_matrix(name: str, dimensions: int) -> bool:
    """The matrices that Muon updates: those of the blocks. The embedding, which is also the head, is none: its rows are
    read one at a time, and AdamW is better for it (Jordan 2024)."""
    return is_decayed(name, dimensions) and name.startswith("model.layers.")


def is_embedding(name: str) -> bool:
    """The embedding, which is also the head (`registry.Architecture.repeated`)."""
    return name == "model.embed_tokens.weight"


def set_rates(inner: torch.optim.Optimizer, lr: float) -> None:
    """Each group's rate in a step with learning rate `lr`."""
    for group in inner.param_groups:
        group["lr"] = lr * group.get(LR_RATIO, 1.0)


def parameter_groups(named: Iterable[tuple[str, Tensor, int]], config: OptimConfig) -> list[dict]:
    """(name, tensor to optimise, dimensions of the logical parameter) -> non-empty groups, the decayed ones first. The
    embedding has a group of its own if its rate is another."""
    matrices, embedding, decayed, rest = [], [], [], []
    for name, tensor, dimensions in named:
        if config.name == "muon" and is_block_matrix(name, dimensions):
            matrices.append(tensor)
        elif is_embedding(name) and config.embedding_lr_ratio != 1:
            embedding.append(tensor)
        else:
            (decayed if is_decayed(name, dimensions) else rest).append(tensor)
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay, MATRICES: True},
        {"params": embedding, "weight_decay": config.weight_decay, LR_RATIO: config.embedding_lr_ratio},
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
