"""The golden vectors: a model with the released semantics, its inputs and everything it computes from them."""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "golden"
NAMES = ("heads4", "heads6_noscale")


class Golden(NamedTuple):
    directory: Path
    io: dict[str, Tensor]
    gradients: dict[str, Tensor]

    @property
    def targets(self) -> Tensor:
        """input_ids as labels, shifted: the last position has no target."""
        ids = self.io["input_ids"]
        return torch.cat([ids[:, 1:], torch.full((len(ids), 1), -100)], dim=1)


def golden(name: str) -> Golden:
    directory = FOLDER / name
    return Golden(directory, load_file(directory / "io.safetensors"), load_file(directory / "grads.safetensors"))


def relative_to_max(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return ((found - wanted).abs().max() / wanted.abs().max()).item()
