"""The settings of the other command lines: plan, benchmark, evaluate, score, generate, convert."""

import dataclasses
from typing import Annotated, Literal

from pydantic.dataclasses import dataclass

from megatron_tn.config.bounds import MOST_INT, Bounds, Count, Positive, Seed
from megatron_tn.config.evaluation import Names
from megatron_tn.config.mapping import STRICT, unwritable
from megatron_tn.config.run import TrainConfig

LOOP_WARM_UP = 10  # steps of the training loop that a benchmark does not count


@dataclass(frozen=True, config=STRICT)
class PlanSettings:
    search: bool = False  # rank layouts by predicted throughput; settings on the command line stay as they are
    dry_run: bool = False  # run a step on tensors without storage as several ranks, and compare their collectives
    tokens: Count = 0  # token budget, for the days that a run takes; 0: 20 tokens a parameter (arXiv 2203.15556)
    json: bool = False  # print JSON; --json is the same


@dataclass(frozen=True, config=STRICT)
class PlanConfig(TrainConfig, PlanSettings):
    """`python -m megatron_tn.plan`: a run's settings, and what to print of its plan."""


@dataclass(frozen=True, config=STRICT)
class BenchmarkSettings:
    steps: Positive = 12  # measured steps after warm-up, for this model and for the peer
    loop_steps: Count = 0  # steps of the whole training loop (data, optimizer, logging) to measure; 0: not measured
    peer: Literal["none", "llama"] = "none"  # another model of the same shape, measured in the same process
    output: str = ""  # JSON lines file to append the results to; empty: results are only printed
    checkpoint: str = ""  # new folder for one rank's share of a checkpoint (megatron_tn.benchmarking.share)


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
    shots: Annotated[int, Bounds(-1, MOST_INT)] = -1  # examples before each question; -1: as many as the task says
    train_manifest: str = ""  # manifest.json of training shards for the unigram baseline; empty: no such baseline
    tokenizer: str = ""  # path of tokenizer.json; empty: the one beside the checkpoint
    max_documents: Count = 0  # evaluate so many held-out documents, equally many of each source; 0: all
    max_document_tokens: Count = 0  # of each held-out document, the first ones, bos included; 0: all
    # Lay held-out documents end to end, as training does, and cut them into sequences of so many tokens, for the loss
    # at positions that few documents reach; 0: each document for itself.
    sequence_tokens: Count = 0
    batch_tokens: Positive = 4096  # tokens of one forward pass
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto: a GPU where there is one
    precision: Literal["trained", "bf16", "fp32"] = "trained"  # type to compute in; trained: as the weights
    # Keep the matrices of the blocks in fp8, with a scale a row: half the bytes that a token of decoding reads.
    fp8_weights: bool = False
    output: str = ""  # JSON file for the result; empty: the result is only printed


@dataclass(frozen=True, config=STRICT)
class ScoreConfig:
    """`python -m megatron_tn.score`."""

    checkpoint: str = ""  # a checkpoint, a run's folder (its newest checkpoint is taken), or a released model's folder
    manifest: str = ""  # manifest.json of the shards to score
    name: str = ""  # name of the scores in sidecar file names; empty: eval- and digits of the model's hash
    batch_tokens: Positive = 16384  # tokens of one forward pass; a GPU needs more than a CPU to be busy
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto: a GPU where there is one
    precision: Literal["trained", "bf16", "fp32"] = "trained"  # type to compute in; trained: as the weights
    # Keep the matrices of the blocks in fp8, with a scale a row: half the bytes that a token of decoding reads.
    fp8_weights: bool = False


@dataclass(frozen=True, config=STRICT)
class GenerateConfig:
    """`python -m megatron_tn.generate`. The sampler checks temperature, top_k, top_p and repetition_penalty."""

    checkpoint: str = ""  # a checkpoint, a run's folder (its newest checkpoint is taken), or a released model's folder
    prompt: str = ""  # text to continue, verbatim
    prompts: str = ""  # JSON lines file of texts to continue, instead of prompt
    output: str = ""  # JSON lines file for the continuations; empty: standard output
    text_key: str = "text"  # key of the text in each line of prompts
    output_key: str = "continuation"  # key that a line of output has beside those of its line of prompts
    resume: bool = False  # continue behind the last whole line of output, which must not exist otherwise
    state: str = ""  # file that save_state wrote: the prompt follows the text that it was made from
    save_state: str = ""  # file for the state after the prompt, from which any number of continuations can begin
    samples: Positive = 1  # continuations of each prompt
    batch: Positive = 8  # continuations at a time
    together: Count = 0  # rows of one forward pass; 0: all on a GPU, 1 on a CPU, where rounding depends on their number
    special_tokens: bool = False  # true: <s> in the prompt is the special token; false: the text of three characters
    tokenizer: str = ""  # path of tokenizer.json; empty: the one beside the checkpoint
    max_new_tokens: Count = 128  # generation ends after so many tokens, or at the model's eos token
    stop: str = ""  # generation ends before this text, taken verbatim; several: a JSON list, ["\n\n", "def "]
    temperature: float = 0.8  # the logits are divided by it; 0: always the likeliest token
    top_k: int = 0  # sample from the top_k likeliest tokens; 0: from all
    top_p: float = 1.0  # sample from the fewest likeliest tokens whose probabilities add up to top_p
    repetition_penalty: float = 1.0  # divides positive logits of tokens seen before, and multiplies negative ones
    seed: Seed = 0  # of the random draws; the same seed gives the same text, on a CPU with together=0 at every batch
    check_every: Count = 0  # tokens between two looks of the host at the ids; 0: 8 on a GPU, 1 on a CPU
    prefill_chunk: Positive = 4096  # tokens of a prompt in one forward pass; a longer prompt needs no more memory
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto: a GPU where there is one. Under torchrun: cpu or auto
    precision: Literal["trained", "bf16", "fp32"] = "trained"  # type to compute in; trained: as the weights
    # Keep the matrices of the blocks in fp8, with a scale a row: half the bytes that a token of decoding reads.
    fp8_weights: bool = False


@dataclass(frozen=True, config=STRICT)
class ConvertConfig:
    """`python -m megatron_tn.convert`."""

    # The command's first word sets it: python -m megatron_tn.convert verify checkpoint=...
    action: Literal["describe", "verify", "export", "import"] = "describe"
    checkpoint: str = ""  # a checkpoint, a run's folder (its newest checkpoint is taken), or a released model's folder
    # export: folder to write in the released layout. import: run_dir whose first checkpoint these weights become
    output: str = ""
    shard_mib: Positive = 4096  # export: MiB of one weight file
    precision: Literal["trained", "bf16", "fp32"] = "trained"  # type to compute in; trained: as the weights
    json: bool = False  # describe, verify: print JSON
