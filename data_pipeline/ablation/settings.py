"""Settings of `python -m data_pipeline.ablation`; defaults and explanations are in conf/ablation.yaml."""

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from data_pipeline.sources import STRICT, Count, LocalFolder, Positive


@dataclass(frozen=True, config=STRICT)
class AblationSettings:
    """output: folder of the corpora. packages: names of installed packages to gather text from; null: all of them.
    documentation_bytes, source_bytes: UTF-8 bytes of documentation and of source code to gather. noise: share of noise
    in the raw corpus's bytes, equal parts of every kind in canary_texts.NOISE. heldout_fraction: share of real
    documents held out. vocab_size: entries of the tokenizer. seed: of the noise and of the cut to equal size. workers:
    processes of the pipeline."""

    output: LocalFolder
    packages: list[str] | None = None
    documentation_bytes: Positive = 17_000_000
    source_bytes: Positive = 8_000_000
    noise: Annotated[float, Field(gt=0, lt=0.9)] = 0.3
    heldout_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    vocab_size: Positive = 8192
    seed: Count = 0
    workers: Positive = 2
