"""Sampling of the next token from the logits of one position."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampler:
    """Samples from softmax(logits / temperature), restricted by top_k and then by top_p.

    temperature: 0 means greedy decoding (argmax).
    top_k: keep the k most probable tokens; 0: all.
    top_p: keep the smallest set of most probable tokens with a total probability of at least p (nucleus sampling,
        arXiv 1904.09751); 1: all.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0

    def problems(self) -> list[str]:
        """A line for each setting that is out of its range."""
        found = []
        if not 0 <= self.temperature < math.inf:
            found.append(f"temperature={self.temperature} must be at least 0, and finite")
        if self.top_k < 0:
            found.append(f"top_k={self.top_k} must be at least 0")
        if not 0 < self.top_p <= 1:
            found.append(f"top_p={self.top_p} must be above 0 and at most 1")
        return found

    def __call__(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """logits [B, V] -> ids [B]. Runs on the CPU, so that random draws do not depend on the device."""
        logits = logits.float().cpu()
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits / self.temperature
        if self.top_k:
            kth = logits.topk(min(self.top_k, logits.shape[-1])).values[..., -1:]
            logits = logits.masked_fill(logits < kth, float("-inf"))
        if self.top_p < 1:
            ordered, order = logits.sort(descending=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= self.top_p)
            logits = logits.masked_fill(dropped, float("-inf"))
        return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
