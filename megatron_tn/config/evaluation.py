"""The settings `evaluation.*`: the held-out loss during training."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from megatron_tn.config.bounds import Count
from megatron_tn.config.mapping import STRICT


@dataclass(frozen=True, config=STRICT)
class EvaluationConfig:
    manifest: str = ""  # manifest.json of held-out shards; empty: no evaluation during training
    every: Count = 0  # steps between evaluations; 0: only at the end of the run
    max_documents: Count = 256  # evaluate the first so many held-out documents; 0: all
