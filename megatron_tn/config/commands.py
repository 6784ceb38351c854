"""The settings of the other command lines: benchmark, evaluate, score, generate, convert."""

from __future__ import annotations

import dataclasses
from typing import Literal

from pydantic.dataclasses import dataclass

from megatron_tn.config.mapping import STRICT, unwritable
from megatron_tn.config.run import TrainConfig

LOOP_WARM_UP = 10  # steps of the training command that a benchmark leaves out


@dataclass(frozen=True, config=STRICT)
class BenchmarkSettings:
    steps: int = 12  # measured steps, after warm-up, of each of the models side by side
    loop_steps: int = 0  # steps of the whole training command (data, optimizer, logging); 0 leaves it out
    peer: Literal["none", "llama"] = "none"  # a model of the same shape, measured in the same process
    output: str = ""  # JSON lines file that the rows are appended to


@dataclass(frozen=True, config=STRICT)
class BenchmarkConfig(TrainConfig):
    """Settings of `python -m megatron_tn.benchmark`: a run's, and how it is measured."""

    benchmark: BenchmarkSettings = dataclasses.field(default_factory=BenchmarkSettings)

    def problems(self, world_size: int | None = None) -> list[str]:
        found = super().problems(world_size)
        if self.benchmark.steps < 1:
            found.append(f"benchmark.steps={self.benchmark.steps} must be at least 1")
        if not (self.benchmark.loop_steps == 0 or self.benchmark.loop_steps > LOOP_WARM_UP):
            found.append(f"benchmark.loop_steps={self.benchmark.loop_steps} must be 0 or above {LOOP_WARM_UP}")
        found += unwritable("benchmark.output", self.benchmark.output)
        return found


@dataclass(frozen=True, config=STRICT)
class EvaluateConfig:
    """Settings of `python -m megatron_tn.evaluate`."""

    checkpoint: str = ""  # a checkpoint folder, a folder of them (the newest is taken), or a released model's folder
    manifest: str = ""  # held-out shards
    train_manifest: str = ""  # shards to count the unigram baseline on; empty leaves that baseline out
    tokenizer: str = ""  # tokenizer.json; empty looks beside the checkpoint
    max_documents: int = 0  # 0: all
    batch_tokens: int = 4096  # of documents scored side by side
    device: str = "auto"
    precision: Literal["trained", "bf16", "fp32"] = "trained"
    output: str = ""  # JSON file for the result, which is printed as well


@dataclass(frozen=True, config=STRICT)
class ScoreConfig:
    """Settings of `python -m megatron_tn.score`."""

    checkpoint: str = ""  # a checkpoint folder, a folder of them (the newest is taken), or a released model's folder
    manifest: str = ""  # of the shards to score
    name: str = ""  # of the scores; empty: eval- and the first digits of the model's hash
    batch_tokens: int = 16384  # of documents scored side by side; a GPU takes more than a CPU
    device: str = "auto"
    precision: Literal["trained", "bf16", "fp32"] = "trained"


@dataclass(frozen=True, config=STRICT)
class GenerateConfig:
    """Settings of `python -m megatron_tn.generate`."""

    checkpoint: str = ""
    prompt: str = ""
    tokenizer: str = ""
    max_new_tokens: int = 128
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    device: str = "auto"
    precision: Literal["trained", "bf16", "fp32"] = "trained"


@dataclass(frozen=True, config=STRICT)
class ConvertConfig:
    """Settings of `python -m megatron_tn.convert`."""

    # The command's first word sets it: python -m megatron_tn.convert verify checkpoint=...
    action: Literal["describe", "verify", "export"] = "describe"
    checkpoint: str = ""
    output: str = ""  # export: folder to write in the released layout
    precision: Literal["trained", "bf16", "fp32"] = "trained"
    json: bool = False  # describe, verify: print JSON
