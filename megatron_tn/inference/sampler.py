"""Sampling of each row's next token from its logits, on the logits' device."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import sample_tokens
from megatron_tn.config import ConfigError

MOST_PENALTY = 1e30  # logits are multiplied by it in fp32


@dataclass(frozen=True)
class Sampler:
    """Samples from softmax(logits / temperature), restricted by top_k and then by top_p.

    temperature: 0 means greedy decoding (argmax).
    top_k: keep the k most probable tokens, and those as probable as the kth; 0: all.
    top_p: keep the smallest set of most probable tokens with a total probability of at least p (nucleus sampling,
        arXiv 1904.09751); 1: all.
    repetition_penalty: before everything else, logits of tokens that were seen, in the prompt or since, are divided by
        it where positive and multiplied where negative (CTRL, arXiv 1909.05858, section 4.1); 1: none.

    Raises:
        ConfigError: settings out of their ranges, a line each.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        found = []
        if not 0 <= self.temperature < math.inf:
            found.append(f"temperature={self.temperature} must be at least 0, and finite")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            found.append(f"top_k={self.top_k} must be at least 0, and whole")
        if not 0 < self.top_p <= 1:
            found.append(f"top_p={self.top_p} must be above 0 and at most 1")
        if not 1 / MOST_PENALTY <= self.repetition_penalty <= MOST_PENALTY:
            between = f"from {1 / MOST_PENALTY:g} to {MOST_PENALTY:g}"
            found.append(f"repetition_penalty={self.repetition_penalty} must be above 0, and {between}")
        if found:
            raise ConfigError(found)


class Plan(NamedTuple):
    """Which parts of `sample` some row needs; the others are left out. Part of a CUDA graph's key.

    candidates: how many of the largest logits are ordered, at least the largest top_k; 0: none.
    """

    random: bool = False
    candidates: int = 0
    nucleus: bool = False
    penalty: bool = False

    @classmethod
    def of(cls, samplers: Iterable[Sampler], vocab_size: int) -> Plan:
        samplers = list(samplers)
        drawing = [sampler for sampler in samplers if sampler.temperature > 0]
        wanted = max((sampler.top_k or (vocab_size if sampler.top_p < 1 else 0) for sampler in drawing), default=0)
        return cls(
            random=bool(drawing),
            candidates=min(1 << (wanted - 1).bit_length(), vocab_size) if wanted else 0,
            nucleus=any(sampler.top_p < 1 for sampler in drawing),
            penalty=any(sampler.repetition_penalty != 1 for sampler in samplers),
        )


class SamplingRows:
    """Every row's settings of `sample`, in tensors at fixed addresses.

    temperature, top_p fp64 [B], penalty fp32 [B], top_k int64 [B]: as in `Sampler`. keys int64 [B]: `stream_key`.
    seen bool [B, V]: the tokens that the penalty falls on; kept up to date only under a plan with a penalty.
    """

    def __init__(self, rows: int, vocab_size: int, device: torch.device):
        self.temperature = torch.zeros(rows, dtype=torch.float64, device=device)
        self.top_k = torch.zeros(rows, dtype=torch.int64, device=device)
        self.top_p = torch.ones(rows, dtype=torch.float64, device=device)
        self.penalty = torch.ones(rows, device=device)
        self.keys = torch.zeros(rows, dtype=torch.int64, device=device)
        self.seen = torch.zeros(rows, vocab_size, dtype=torch.bool, device=device)

    def set(self, row: int, sampler: Sampler, key: int, seen: Iterable[int]) -> None:
        """seen: the ids of the prompt."""
        self.temperature[row] = sampler.temperature
        self.top_k[row] = min(sampler.top_k, self.seen.shape[1])
        self.top_p[row] = sampler.top_p
        self.penalty[row] = sampler.repetition_penalty
        self.keys[row] = key
        self.seen[row] = False
        if sampler.repetition_penalty != 1:
            self.seen[row, torch.tensor(sorted(set(seen)), device=self.seen.device)] = True


def sample(logits: Tensor, rows: SamplingRows, positions: Tensor, plan: Plan) -> Tensor:
    """logits [B, V] -> ids int64 [B]. positions int64 [B]: of the tokens that the logits follow.

    A row's id depends on its own logits and settings alone: the plan only leaves out what no row needs.
    """
    if not plan.random and not plan.penalty:
        return logits.argmax(-1)
    return sample_tokens(
        logits,
        rows.keys,
        positions,
        temperature=rows.temperature,
        top_k=rows.top_k,
        top_p=rows.top_p,
        penalty=rows.penalty if plan.penalty else None,
        seen=rows.seen if plan.penalty else None,
        candidates=plan.candidates,
        nucleus=plan.nucleus,
    )
