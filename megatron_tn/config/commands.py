"""The settings of the other command lines: plan, benchmark, evaluate, score, generate, convert."""

import dataclasses
from typing import Annotated, Literal

from pydantic.dataclasses import dataclass

from megatron_tn.config.bounds import MOST_INT, Bounds, Count, Positive, Seed, out_of_bounds
from megatron_tn.config.evaluation import Names
from megatron_tn.config.mapping import STRICT, unwritable
from megatron_tn.config.run import TrainConfig

LOOP_WARM_UP = 10  # steps of the training loop that a benchmark does not count


@dataclass(frozen=True, config=STRICT)
class PlanSettings:
    search: bool = False  # rank layouts by predicted throughput; settings given on the command line stay as they are
    # Run one step as each of several ranks, on tensors without storage, and compare the ranks' collectives.
    dry_run: bool = False
    # Tokens of the whole run, for the days that it takes; 0: 20 tokens a parameter (arXiv 2203.15556).
    tokens: Count = 0
    json: bool = False  # print JSON instead of tables; --json is the same


@dataclass(frozen=True, config=STRICT)
class PlanConfig(TrainConfig, PlanSettings):
    """`python -m megatron_tn.plan`: a run's settings, and what to print of its plan."""

    def job_problems(self) -> list[str]:
        """Bounds alone: a search may find the layout that a relation asks for, and the sweep's table names the rest."""
        return list(out_of_bounds(self).values())


@dataclass(frozen=True, config=STRICT)
class BenchmarkSettings:
    steps: Positive = 12  # measured steps after warm-up, for this model and for the peer
    # Steps of the whole training loop (data, optimizer, logging) to measure besides, of which the first 10 do not
    # count: 0 or at least 11; 0: not measured.
    loop_steps: Count = 0
    # llama: also measure a LLaMA of the same shape in the same process; none: this model alone.
    peer: Literal["none", "llama"] = "none"
    output: str = ""  # JSON lines file to append the results to; empty: results are only printed
    checkpoint: str = ""  # megatron_tn.benchmarking.share alone: new folder for one rank's share of a checkpoint


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

    # A checkpoint, a run's folder (its newest checkpoint is taken), or a released model's folder; has to be set.
    checkpoint: str = ""
    manifest: str = ""  # manifest.json of held-out shards; empty: no held-out loss, tasks alone
    # Tasks of lm-evaluation-harness, by name or by task file (docs/evaluation.md); need pip install -e '.[eval]'. []:
    # none.
    tasks: Names = dataclasses.field(default_factory=list)
    task_folder: str = ""  # folder of your own task files, which tasks may name; empty: none
    task_documents: Count = 0  # evaluate only the first so many documents of each task; 0: all
    # Solved examples before each question of a task; -1: as many as the task's own file says.
    shots: Annotated[int, Bounds(-1, MOST_INT)] = -1
    # manifest.json of training shards, to compare with a unigram model of their tokens; empty: no such baseline.
    train_manifest: str = ""
    tokenizer: str = ""  # path of tokenizer.json; empty: the one beside the checkpoint
    max_documents: Count = 0  # number of held-out documents to evaluate, equally many of each source; 0: all
    # Evaluate only the first so many tokens of each held-out document, bos included; 0: all.
    max_document_tokens: Count = 0
    # N: lay held-out documents end to end, as training does, and cut them into sequences of N tokens, for the loss at
    # positions that few documents reach; 0: each document is a sequence.
    sequence_tokens: Count = 0
    # Tensor-parallel size: so many processes of the launcher split every matrix, and the groups of them share documents
    # and requests. 0: all processes are one group.
    tp: Count = 0
    batch_tokens: Positive = 4096  # tokens of one forward pass at most; more use more memory, and keep a GPU busier
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto: the GPU if there is one, else the CPU
    precision: Literal["trained", "bf16", "fp32"] = "trained"  # type to compute in; trained: that of the stored weights
    # true: keep the blocks' matrices in fp8, with one scale per row: half the bytes of bf16 to read for each decoded
    # token. false: keep them in the type of precision.
    fp8_weights: bool = False
    output: str = ""  # JSON file for the result, with the loss by position; empty: none
    json: bool = False  # print the JSON instead of tables


@dataclass(frozen=True, config=STRICT)
class ScoreConfig:
    """`python -m megatron_tn.score`."""

    # A checkpoint, a run's folder (its newest checkpoint is taken), or a released model's folder; has to be set.
    checkpoint: str = ""
    manifest: str = ""  # manifest.json of the shards to score; has to be set
    # Name of the scores in the sidecars' file names, SHARD.NAME.scores.npy; empty: eval- and digits of the model's
    # hash.
    name: str = ""
    batch_tokens: Positive = 16384  # tokens of one forward pass at most; more use more memory, and keep a GPU busier
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto: the GPU if there is one, else the CPU
    precision: Literal["trained", "bf16", "fp32"] = "trained"  # type to compute in; trained: that of the stored weights
    # true: keep the blocks' matrices in fp8, with one scale per row: half the bytes of bf16 to read for each decoded
    # token. false: keep them in the type of precision.
    fp8_weights: bool = False


@dataclass(frozen=True, config=STRICT)
class GenerateConfig:
    """`python -m megatron_tn.generate`. The sampler checks temperature, top_k, top_p and repetition_penalty."""

    # A checkpoint, a run's folder (its newest checkpoint is taken), or a released model's folder; has to be set.
    checkpoint: str = ""
    prompt: str = ""  # text to continue, verbatim
    prompts: str = ""  # JSON lines file of texts to continue, instead of prompt; empty: continue prompt
    output: str = ""  # JSON lines file for the continuations; empty: standard output
    text_key: str = "text"  # key of the text in each line of prompts
    # Key of the continuation in each line of output, beside the keys of its line of prompts.
    output_key: str = "continuation"
    resume: bool = False  # true: go on after the last whole line of output; false: output must not exist yet
    state: str = ""  # file that save_state wrote; the prompt then follows the text whose state it holds. empty: none
    # File to write the model's state after the prompt to, from which any number of continuations can begin; it replaces
    # no file but an earlier state of the same model. empty: none.
    save_state: str = ""
    samples: Positive = 1  # continuations of each prompt
    batch: Positive = 8  # continuations that are decoded at a time
    # Rows of one forward pass. 0: on a GPU all of batch; on a CPU 1, since rounding there depends on the number of
    # rows.
    together: Count = 0
    special_tokens: bool = False  # true: <s> in the prompt is the special token; false: the text of three characters
    tokenizer: str = ""  # path of tokenizer.json; empty: the one beside the checkpoint
    max_new_tokens: Count = 128  # generation ends after so many tokens, or earlier at the model's eos token
    # Generation ends before this text, taken verbatim; several as a JSON list: ["\n\n", "def "]; empty: none.
    stop: str = ""
    temperature: float = 0.8  # the logits are divided by it; 0: always the likeliest token
    top_k: int = 0  # sample from the top_k likeliest tokens; 0: from all
    top_p: float = 1.0  # sample from the fewest likeliest tokens whose probabilities add up to top_p; 1: from all
    # Logits of tokens seen before are divided by it if positive, else multiplied; 1: no penalty.
    repetition_penalty: float = 1.0
    seed: Seed = 0  # seed of the random draws; equal seeds give equal texts, on a CPU with together=0 whatever batch is
    # Tokens decoded between two checks on the host whether a text has ended; 0: 8 on a GPU, 1 on a CPU.
    check_every: Count = 0
    # Tokens of a prompt in one forward pass; longer prompts take several passes and no more memory.
    prefill_chunk: Positive = 4096
    # cpu, cuda, cuda:1, ...; auto: the GPU if there is one, else the CPU. Under torchrun only cpu or auto.
    device: str = "auto"
    precision: Literal["trained", "bf16", "fp32"] = "trained"  # type to compute in; trained: that of the stored weights
    # true: keep the blocks' matrices in fp8, with one scale per row: half the bytes of bf16 to read for each decoded
    # token. false: keep them in the type of precision.
    fp8_weights: bool = False


@dataclass(frozen=True, config=STRICT)
class ConvertConfig:
    """`python -m megatron_tn.convert`."""

    # what to do with checkpoint; the command's first word sets it: python -m megatron_tn.convert verify checkpoint=...
    # describe: print what it holds; verify: compare its files with their hashes; export: write the released layout;
    # import: make released weights a run's first checkpoint.
    action: Literal["describe", "verify", "export", "import"] = "describe"
    # A checkpoint, a run's folder (its newest checkpoint is taken), or a released model's folder; has to be set.
    checkpoint: str = ""
    # export: folder to write in the released layout; import: run_dir whose first checkpoint these weights become. Both
    # need it.
    output: str = ""
    shard_mib: Positive = 4096  # export: MiB of one weight file at most
    # type of exported weights; import: engine.precision of the new checkpoint. trained: that of the stored weights.
    precision: Literal["trained", "bf16", "fp32"] = "trained"
    json: bool = False  # describe, verify: print JSON instead of a table
