"""Settings of `python -m data_pipeline.selfclean`; defaults and explanations are in conf/rounds.yaml."""

import sys
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from data_pipeline.selfclean.bands import Quantiles
from data_pipeline.shards.scores import MEASURES
from data_pipeline.sources import STRICT, LocalFolder, Positive
from data_pipeline.thresholds import Share


@dataclass(frozen=True, config=STRICT)
class RoundsSettings:
    """manifest: the shards to clean; output: folder of the rounds; rounds: their number.

    evaluation_model: model to train, a choice of conf/model; train, score: further overrides for trainer and scorer.
    measure, quantiles: determine the kept band of each source and language. each: audit documents per place, source and
    language, 0 for no audit; audit: whether to wait for the verdicts before the next round; precision: minimum share of
    drops that people confirm.
    """

    manifest: str
    output: LocalFolder
    rounds: Positive = 1
    evaluation_model: str = "385m"
    train: list[str] = Field(default_factory=list)
    score: list[str] = Field(default_factory=list)
    measure: Literal[MEASURES] = "nats_per_token"
    quantiles: Quantiles = Field(default_factory=Quantiles)
    each: Annotated[int, Field(ge=0)] = 20
    audit: Literal["skip", "wait"] = "skip"
    precision: Share = 0.8
    seed: Annotated[int, Field(ge=0)] = 0
    trainer: list[str] = Field(default_factory=lambda: [sys.executable, "-m", "megatron_tn.train"])
    scorer: list[str] = Field(default_factory=lambda: [sys.executable, "-m", "megatron_tn.score"])
