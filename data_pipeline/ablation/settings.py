"""Settings of `python -m data_pipeline.ablation`; their defaults for people are in conf/ablation.yaml."""

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from data_pipeline.config import compose_plain, parse
from data_pipeline.sources import STRICT, Count, LocalFolder, Positive


@dataclass(frozen=True, config=STRICT)
class AblationSettings:
    """output: folder of the corpora. packages: whose text is gathered, null for all that are installed;
    documentation_bytes, source_bytes: how much of each kind, in UTF-8 bytes.

    noise: the share of the raw corpus's bytes that is planted, equally of every kind of canary_texts.NOISE;
    heldout_fraction: of the real documents, kept from training. workers: processes of the pipeline.
    """

    output: LocalFolder
    packages: list[str] | None = None
    documentation_bytes: Positive = 17_000_000
    source_bytes: Positive = 8_000_000
    noise: Annotated[float, Field(gt=0, lt=0.9)] = 0.3
    heldout_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    vocab_size: Positive = 8192
    seed: Count = 0
    workers: Positive = 2


def compose_ablation(overrides: list[str]) -> AblationSettings:
    """From conf/ablation.yaml and overrides in Hydra's grammar; raises InputError with a line a problem."""
    data, _ = compose_plain("ablation", overrides, AblationSettings)
    return parse(data, cls=AblationSettings)
