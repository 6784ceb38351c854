"""Settings of `python -m data_pipeline.selfclean`; defaults and explanations are in conf/rounds.yaml."""

import sys
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from data_pipeline.config import compose_plain, parse
from data_pipeline.shards.scores import MEASURES
from data_pipeline.sources import STRICT, LocalFolder, Positive

Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, config=STRICT)
class QuantileSettings:
    """Of each source and language, documents are kept whose score lies between the quantiles `low` and `high`. A
    language with fewer than `minimum` documents has its source's quantiles, and such a source those of all documents.
    `sources`: {NAME: [LOW, HIGH]}."""

    low: Share = 0.02
    high: Share = 0.98
    minimum: Positive = 1000
    sources: dict[str, tuple[Share, Share]] = Field(default_factory=dict)

    def __post_init__(self):
        for name, (low, high) in {"quantiles": (self.low, self.high), **self.sources}.items():
            if low >= high:
                raise ValueError(f"{name}: low={low} must be below high={high}")


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
    quantiles: QuantileSettings = Field(default_factory=QuantileSettings)
    each: Annotated[int, Field(ge=0)] = 20
    audit: Literal["skip", "wait"] = "skip"
    precision: Share = 0.8
    seed: Annotated[int, Field(ge=0)] = 0
    trainer: list[str] = Field(default_factory=lambda: [sys.executable, "-m", "megatron_tn.train"])
    scorer: list[str] = Field(default_factory=lambda: [sys.executable, "-m", "megatron_tn.score"])


def compose_rounds(overrides: list[str]) -> RoundsSettings:
    """Settings from conf/rounds.yaml and overrides in Hydra's grammar; raises InputError, a line per problem."""
    data, _ = compose_plain("rounds", overrides, RoundsSettings)
    return parse(data, cls=RoundsSettings)
