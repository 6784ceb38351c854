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
    """manifest: the shards to clean. output: folder of the rounds. rounds: their number. evaluation_model: the model to
    train in each round, a choice of conf/model. train, score: further overrides of trainer and scorer. measure: the
    score, nats_per_token or nats_per_byte; quantiles: the band of scores that is kept of each source and language.
    each: documents in the audit sample per place, source and language; 0: no audit. audit: wait: the next round waits
    for the verdicts; skip: it does not. precision: target share of dropped documents that people would drop, too. seed:
    of the random choice of the sample. trainer, scorer: the commands that train and score."""

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
