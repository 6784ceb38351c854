"""The settings `evaluation.*`: the held-out loss during training."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from megatron_tn.config.bounds import Count
from megatron_tn.config.mapping import STRICT


@dataclass(frozen=True, config=STRICT)
class EvaluationConfig:
    manifest: str = ""  # manifest.json of held-out shards; empty turns evaluation off
    every: Count = 0  # steps; 0 evaluates at the end only
    max_documents: Count = 256  # 0: all
