"""The settings of the other command lines: benchmark, evaluate, score, generate, convert."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from pydantic.dataclasses import dataclass

from megatron_tn.config.bounds import MOST_INT, Bounds, Count, Positive, Seed
from megatron_tn.config.evaluation import Names
from megatron_tn.config.mapping import STRICT, unwritable
from megatron_tn.config.run import TrainConfig

LOOP_WARM_UP = 10  # steps of the training loop that a benchmark does not count


@dataclass(frozen=True, config=STRICT)
class BenchmarkSettings:
    steps: Positive = 12  # measured steps, after warm-up, of this model and of its peer
    loop_steps: Count = 0  # steps of the training loop (data, optimizer, logging); 0 leaves it out
    peer: Literal["none", "llama"] = "none"  # a model of the same shape, measured in the same process
    output: str = ""  # JSON lines file to which the rows are appended


@dataclass(frozen=True, config=STRICT)
class BenchmarkConfig(TrainConfig):
    """`python -m megatron_tn.benchmark`: a run's settings, and how it is measured."""

    benchmark: BenchmarkSettings = dataclasses.field(default_factory=BenchmarkSettings)

    def problems(self, world_size: int | None = None) -> list[str]:
        found = super().problems(world_size)
        if 0 < self.benchmark.loop_steps <= LOOP_WARM_UP:
            found.append(f"benchmark.loop_steps={self.benchmark.loop_steps} must be 0 or above {LOOP_WARM_UP}")
        return [*found, *unwritable("benchmark.output", self.benchmark.output)]


@dataclass(frozen=True, config=STRICT)
class EvaluateConfig:
    """`python -m megatron_tn.evaluate`."""

    checkpoint: str = ""  # a checkpoint, a run's folder (its newest checkpoint is taken), or a released model's folder
    manifest: str = ""  # manifest.json of held-out shards
    # Tasks of lm-evaluation-harness, by name or as task files: docs/evaluation.md. They need the extra eval.
    tasks: Names = dataclasses.field(default_factory=list)
    task_folder: str = ""  # a folder of task files of one's own, whose names `tasks` may then have
    task_documents: Count = 0  # of each task, the first ones; 0: all
    shots: Annotated[int | None, Bounds(0, MOST_INT)] = None  # examples before each question; null: as the task says
    train_manifest: str = ""  # of the shards that the unigram baseline is counted on; empty leaves that baseline out
    tokenizer: str = ""  # tokenizer.json; empty looks beside the checkpoint
    max_documents: Count = 0  # of the held-out shards, equally many of each source; 0: all
    batch_tokens: Positive = 4096  # tokens of the documents in one forward pass; a GPU takes more than a CPU
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto: a GPU where there is one
    precision: Literal["trained", "bf16", "fp32"] = "trained"  # trained: what the weights were trained or stored in
    output: str = ""  # JSON file for the result, which is printed as well


@dataclass(frozen=True, config=STRICT)
class ScoreConfig:
    """`python -m megatron_tn.score`."""

    checkpoint: str = ""  # a checkpoint, a run's folder (its newest checkpoint is taken), or a released model's folder
    manifest: str = ""  # manifest.json of the shards to score
    name: str = ""  # of the scores; empty: eval- and the first digits of the model's hash
    batch_tokens: Positive = 16384  # tokens of the documents in one forward pass; a GPU takes more than a CPU
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto: a GPU where there is one
    precision: Literal["trained", "bf16", "fp32"] = "trained"  # trained: what the weights were trained or stored in


@dataclass(frozen=True, config=STRICT)
class GenerateConfig:
    """`python -m megatron_tn.generate`. The sampler checks temperature, top_k and top_p."""

    checkpoint: str = ""  # a checkpoint, a run's folder (its newest checkpoint is taken), or a released model's folder
    prompt: str = ""  # text to continue, taken to the letter
    special_tokens: bool = False  # whether <s> in the prompt is that special token, and not the text of 3 characters
    tokenizer: str = ""  # tokenizer.json; empty looks beside the checkpoint
    max_new_tokens: Count = 128  # generation ends there, or before the model's eos
    temperature: float = 0.8  # 0: the likeliest token each time
    top_k: int = 0  # sample from the so many likeliest tokens; 0: all
    top_p: float = 1.0  # sample from the likeliest tokens of this share of probability
    seed: Seed = 0  # the same seed gives the same text
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto: a GPU where there is one
    precision: Literal["trained", "bf16", "fp32"] = "trained"  # trained: what the weights were trained or stored in


@dataclass(frozen=True, config=STRICT)
class ConvertConfig:
    """`python -m megatron_tn.convert`."""

    # The command's first word sets it: python -m megatron_tn.convert verify checkpoint=...
    action: Literal["describe", "verify", "export", "import"] = "describe"
    checkpoint: str = ""  # a checkpoint, a run's folder (its newest checkpoint is taken), or a released model's folder
    # export: folder to write in the released layout. import: run_dir whose first checkpoint these weights become
    output: str = ""
    shard_mib: Positive = 4096  # export: MiB of one weight file
    precision: Literal["trained", "bf16", "fp32"] = "trained"  # trained: what the weights were trained or stored in
    json: bool = False  # describe, verify: print JSON
