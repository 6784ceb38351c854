"""The settings of a training run, and the relations between them."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator
from pydantic.dataclasses import dataclass

from megatron_tn.config.mapping import STRICT, from_mapping, read_mapping


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """Shape and variant of a TransNormerLLM (arXiv 2307.14995; the released family's semantics are the default)."""

    name: str = "385m"  # of the size, for reports
    architecture: Literal["transnormer"] = "transnormer"  # of megatron_tn.model.registry
    vocab_size: int = 64000  # V, the true vocabulary; padded rows are added by the vocabulary-parallel embedding
    embed_dim: int = 1024  # D
    layers: int = 24  # L
    heads: int = 8  # H; the released sizes keep D / H = 128
    glu_dim: int = 2816  # F
    scale_embedding: bool = True  # x = E[ids] * sqrt(D); the 3B and larger models leave it out
    norm: Literal["simplermsnorm", "rmsnorm"] = "simplermsnorm"
    norm_eps: float = 1e-6
    act: Literal["silu", "none", "1+elu"] = "silu"  # on q and k only
    glu_act: Literal["none", "silu"] = "none"
    gate: bool = True  # the output gate u of the token mixer
    lrpe: Literal["first", "all", "none"] | list[bool] = "first"  # which layers apply LRPE
    decay: Literal["released", "paper", "none"] = "released"  # form of the per-head decay rates
    decay_temperature: bool = True  # the factor 1 - l/(L-1): later layers decay more slowly
    init_std: float = 0.02
    pad_id: int = 0
    bos_id: int = 1
    eos_id: int = 2

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.heads

    @property
    def lrpe_layers(self) -> list[bool]:
        if isinstance(self.lrpe, list):
            return list(self.lrpe)
        return [self.lrpe == "all" or (self.lrpe == "first" and layer == 0) for layer in range(self.layers)]

    def problems(self, tp: int = 1) -> list[str]:
        """Relations inside the model, and those to a tensor-parallel size."""
        found = [
            f"model.{name}={getattr(self, name)} must be at least 1"
            for name in ("vocab_size", "embed_dim", "layers", "heads", "glu_dim")
            if getattr(self, name) < 1
        ]
        if found:
            return found
        if self.embed_dim % self.heads:
            found.append(f"model.embed_dim={self.embed_dim} is not divisible by model.heads={self.heads}")
        if isinstance(self.lrpe, list) and len(self.lrpe) != self.layers:
            found.append(f"model.lrpe has {len(self.lrpe)} entries but model.layers={self.layers}")
        for name in ("pad_id", "bos_id", "eos_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                found.append(f"model.{name}={getattr(self, name)} is not below model.vocab_size={self.vocab_size}")
        if self.heads % tp:
            found.append(f"model.heads={self.heads} is not divisible by parallel.tp={tp}")
        if self.glu_dim < tp:
            found.append(f"model.glu_dim={self.glu_dim} is smaller than parallel.tp={tp}")
        return found


@dataclass(frozen=True, config=STRICT)
class ParallelConfig:
    """How the world is laid out. The data-parallel size is what is left: world / (tp x cp)."""

    tp: int = 1  # tensor parallel: heads of GLA, columns and rows of SGLU, rows of the vocabulary
    cp: int = 1  # context parallel: contiguous slices of the sequence
    # Megatron's: between the split layers tensor-parallel ranks share the tokens out, where they would repeat the work.
    sequence_parallel: bool = False


@dataclass(frozen=True, config=STRICT)
class EngineConfig:
    """Who owns gradients, masters and the optimizer step."""

    name: Literal["deepspeed", "fsdp2", "local"] = "deepspeed"
    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["bf16", "fp32"] = "bf16"  # of parameters and activations; masters and moments are always fp32
    gradient_dtype: Literal["fp32", "bf16"] = "fp32"  # in which microbatch gradients accumulate and are reduced
    reduce_bucket_elements: int = 50_000_000  # gradients reduced at once, but by zero3 and fsdp2, which take a block's
    reshard_after_forward: bool = True  # fsdp2: free a block's gathered weights between its forward and backward pass
    recompute: Literal["none", "selective", "full"] = "none"  # activations made again in the backward pass
    recompute_every: int = 1  # of every so many blocks, the first recomputes
    # Blocks compiled by inductor; cuda_graphs replays them besides, which hides the host where models are small.
    compile: Literal["none", "blocks", "cuda_graphs"] = "none"
    # local and zero1: a microbatch's forward and backward pass is captured as one CUDA graph, and replayed.
    cuda_graph: bool = False
    # deepspeed: a DeepSpeed configuration of one's own, laid over ours. A JSON file, read once, which becomes part
    # of the run's config. Keys that other settings decide must agree with them.
    deepspeed_config: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def sums_own_gradients(self) -> bool:
        """Whether gradients are summed over microbatches and ranks by gradients/accumulator.py, in fp32; otherwise by
        FSDP2 or DeepSpeed."""
        if self.name == "deepspeed":
            return (self.zero_stage, self.precision, self.gradient_dtype) == (1, "bf16", "fp32")
        return self.name == "local"

    def problems(self, cp: int = 1) -> list[str]:
        """Relations inside the engine's settings, and those to a layout."""
        found = []
        if self.deepspeed_config and self.name != "deepspeed":
            found.append(f"engine.deepspeed_config is set, but engine.name={self.name} is not deepspeed")
        if self.gradient_dtype == "bf16" and (self.name != "deepspeed" or self.precision != "bf16"):
            found.append(
                f"engine.gradient_dtype=bf16 needs DeepSpeed in bf16: engine.name={self.name}, engine.precision="
                f"{self.precision} sum in fp32"
            )
        if not self.cuda_graph:
            return found
        if not self.sums_own_gradients:
            found.append(
                "engine.cuda_graph=true goes with engine=local, or engine=zero1 with engine.precision=bf16 and "
                f"engine.gradient_dtype=fp32; here engine.name={self.name}, engine.zero_stage={self.zero_stage}, "
                f"engine.precision={self.precision}, engine.gradient_dtype={self.gradient_dtype}"
            )
        if self.compile != "none":
            found.append(f"engine.cuda_graph=true captures eager passes, but engine.compile={self.compile} is not none")
        if cp > 1:
            found.append(f"engine.cuda_graph=true does not go with parallel.cp={cp}, whose slices the host works out")
        return found

    @field_validator("deepspeed_config", mode="before")
    @classmethod
    def _read_deepspeed_config(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if not value:
            return {}
        try:
            return json.loads(Path(value).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{value!r} is not a JSON file that can be read: {error}") from None


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    manifest: str = ""  # manifest.json of tokenised WebDataset shards (python -m data_pipeline.run writes one)
    sequence_length: int = 2048  # tokens
    global_batch: int = 64  # sequences per optimizer step, over all ranks
    micro_batch: int = 1  # sequences per forward pass of one rank
    shuffle_window: int = 32  # shards whose sequences are mixed; a batch of neighbours in text teaches less
    # Self-cleaning: a YAML file or inline JSON of data_pipeline.stream.ScoreFilter, or a filter of one's own as
    # module:object; empty keeps all.
    filter: str = ""
    # Functions of data_pipeline.stream.Document, as module:function: applied to each document, which keeps its length.
    document_stages: list[str] = dataclasses.field(default_factory=list)
    # Sources by {epochs: {...}} or {weights: {...}}; on the command line: +data.mixture.epochs.wiki=1.5
    mixture: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    isolate_documents: bool = False  # attention state is reset at document boundaries; the paper cuts without isolation
    workers: int = 1  # reader processes per data-parallel rank; 0 reads in the training process
    max_damaged: int = 100  # unreadable samples that a rank feeds as padding before it stops
    cache_bytes: int = 100_000_000_000  # of the local copies of a remote manifest's shards, on each node
    # Batches that are not trained on, each by the number of the step that would: [17, "100-299"]. Kept in checkpoints.
    skip_batches: list[int | str] = dataclasses.field(default_factory=list)

    @property
    def skip_ranges(self) -> list[tuple[int, int]]:
        """The first and the last batch of each entry of skip_batches.

        Raises:
            ValueError: an entry is neither a number from 1 nor a range of them.
        """
        found = []
        for entry in self.skip_batches:
            first, dash, last = str(entry).partition("-")
            if not (first.isdecimal() and (last.isdecimal() or not dash) and 1 <= int(first) <= int(last or first)):
                raise ValueError(f"data.skip_batches: {entry!r} is neither a step from 1 nor a range such as '100-299'")
            found.append((int(first), int(last or first)))
        return found

    @property
    def skipped(self) -> set[int]:
        """skip_batches, with ranges spelled out. Raises ValueError as `skip_ranges` does."""
        return {batch for first, last in self.skip_ranges for batch in range(first, last + 1)}


@dataclass(frozen=True, config=STRICT)
class OptimConfig:
    """AdamW."""

    lr: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # of matrices; vectors (norm weights) and LRPE's theta are not decayed
    clip_norm: float = 1.0  # of the global gradient; 0 turns clipping off
    # Whose kernel: "auto" is this package's ("triton") on a GPU, PyTorch's on a CPU; "apex" is NVIDIA apex's FusedAdam.
    fused: Literal["auto", "triton", "torch", "apex"] = "auto"


@dataclass(frozen=True, config=STRICT)
class ScheduleConfig:
    name: Literal["cosine", "wsd", "constant"] = "cosine"
    steps: int = 1000  # optimizer steps of the whole run
    warmup_steps: int = 100
    decay_fraction: float = 0.2  # of the steps, at the end of a warm-up-stable-decay schedule
    min_lr_ratio: float = 0.1  # final learning rate over peak
    # The batch may grow: from ramp_from sequences (0: data.global_batch throughout) by ramp_increment at a time, spread
    # evenly over the first ramp_steps steps, to data.global_batch.
    ramp_from: int = 0
    ramp_increment: int = 0
    ramp_steps: int = 0

    def ramp_problems(self, global_batch: int, multiple: int) -> list[str]:
        """multiple: sequences in one microbatch of all ranks."""
        if self.ramp_from == self.ramp_increment == self.ramp_steps == 0:
            return []
        shown = f"schedule.ramp_from={self.ramp_from}, schedule.ramp_increment={self.ramp_increment}"
        if self.ramp_from < 1 or self.ramp_increment < 1:
            return [f"{shown}: a batch-size ramp needs both to be at least 1"]
        found = []
        if self.ramp_from >= global_batch or (global_batch - self.ramp_from) % self.ramp_increment:
            found.append(f"{shown} do not lead to data.global_batch={global_batch} in whole increments")
        elif self.ramp_steps < (increments := (global_batch - self.ramp_from) // self.ramp_increment):
            found.append(
                f"schedule.ramp_steps={self.ramp_steps} is below the {increments} increments from schedule.ramp_from="
                f"{self.ramp_from} to data.global_batch={global_batch}"
            )
        if self.ramp_steps >= self.steps:
            found.append(
                f"schedule.ramp_steps={self.ramp_steps} must be below schedule.steps={self.steps}: the batch would "
                f"never reach data.global_batch={global_batch}"
            )
        if self.ramp_from % multiple or self.ramp_increment % multiple:
            found.append(f"{shown} must be multiples of data.micro_batch x data-parallel size = {multiple}")
        return found


@dataclass(frozen=True, config=STRICT)
class CheckpointConfig:
    every: int = 500  # steps; 0 saves only at the end and on preemption
    at_end: bool = True  # save when the run ends; False is for benchmarks
    keep: int = 3  # newest checkpoints kept; 0 keeps all
    keep_every: int = 0  # of the older ones, those at multiples of so many steps stay as well; 0: none for that
    keep_best: int = 0  # and so many with the lowest held-out loss, of those that were evaluated at their own step
    # Training goes on while a save is written, for host memory of one copy of what the rank owns (12 bytes a parameter
    # without ZeRO). On by default: a step that waits for a shared file system stops every GPU.
    async_save: bool = True
    on_failure: Literal["report", "abort"] = "report"  # of a save that could not be written; the last of a run aborts
    resume: int | str = "auto"  # auto: the newest whole one in run_dir; none: start afresh; a step there; a path


@dataclass(frozen=True, config=STRICT)
class GuardConfig:
    """What happens when a step goes wrong. All ranks decide the same, from numbers that were reduced over all of them.

    rewind goes back to the newest checkpoint and skips the batch that went wrong, for good (docs/checkpoints.md).
    """

    nonfinite: Literal["skip", "rewind", "abort"] = "skip"  # the update is never applied; skip goes on with the next
    max_consecutive: int = 10  # steps in a row that are not finite, after which the run aborts
    spike: Literal["off", "report", "rewind", "abort"] = "report"
    # A loss is a spike when it is above the median of the last spike_window losses by spike_sigmas standard deviations
    # (from the median absolute deviation, which spikes do not move) and by spike_nats.
    spike_window: int = 128  # steps; nothing is a spike before half of it is known
    spike_sigmas: float = 8.0
    spike_nats: float = 0.5
    skip_before: int = 0  # batches before the bad one that a rewind skips as well
    max_rewinds: int = 5  # of a run, after which it aborts


@dataclass(frozen=True, config=STRICT)
class EvaluationConfig:
    manifest: str = ""  # held-out shards; empty turns evaluation off
    every: int = 0  # steps; 0 evaluates at the end only
    max_documents: int = 256


@dataclass(frozen=True, config=STRICT)
class WandbConfig:
    mode: Literal["online", "offline", "disabled"] = "offline"
    project: str = "megatron_tn"
    entity: str | None = None


@dataclass(frozen=True, config=STRICT)
class LoggingConfig:
    every: int = 1  # steps between records of log.jsonl
    progress: bool = True  # progress bar on rank 0
    ranks_every: int = 100  # steps between reports of how ranks differ in speed, and of peak memory; 0: none
    profile: bool = False  # write a Chrome trace and a table of kernels of a few steps of rank 0 to run_dir/profile
    profile_skip: int = 10  # steps of this process before the first one that is profiled
    profile_steps: int = 3
    wandb: WandbConfig = dataclasses.field(default_factory=WandbConfig)


@dataclass(frozen=True, config=STRICT)
class ClusterConfig:
    """The hardware, by its datasheet: what plans and utilisation figures are counted against."""

    name: str = "local"
    gpus_per_node: int = 0
    gpu_memory_gib: float = 0.0
    outside_allocator_gib: float = 1.5  # what a plan leaves a process for CUDA's context, kernels and NCCL's buffers
    bf16_tflops: float | None = None  # dense peak of one GPU
    memory_bandwidth_gbs: float | None = None
    interconnect_gbs: float | None = None  # between nodes, per GPU


MOST_SEED = 2**64 - 1  # the largest that torch takes

# Setting -> the least and the largest value it may have.
BOUNDS: dict[str, tuple[int, float]] = {
    **dict.fromkeys(
        (
            "nodes",
            "distributed_timeout_s",
            "data.sequence_length",
            "data.global_batch",
            "data.micro_batch",
            "data.shuffle_window",
            "engine.reduce_bucket_elements",
            "engine.recompute_every",
            "schedule.steps",
            "guard.max_consecutive",
            "logging.every",
            "logging.profile_steps",
        ),
        (1, math.inf),
    ),
    **dict.fromkeys(
        (
            "stop_after",
            "model.norm_eps",
            "model.init_std",
            "data.workers",
            "data.max_damaged",
            "data.cache_bytes",
            "optim.weight_decay",
            "optim.clip_norm",
            "schedule.warmup_steps",
            "schedule.ramp_from",
            "schedule.ramp_increment",
            "schedule.ramp_steps",
            "checkpoint.every",
            "checkpoint.keep",
            "checkpoint.keep_every",
            "checkpoint.keep_best",
            "guard.spike_sigmas",
            "guard.spike_nats",
            "guard.skip_before",
            "guard.max_rewinds",
            "evaluation.every",
            "evaluation.max_documents",
            "logging.ranks_every",
            "logging.profile_skip",
            "cluster.gpus_per_node",
            "cluster.gpu_memory_gib",
            "cluster.outside_allocator_gib",
        ),
        (0, math.inf),
    ),
    "seed": (0, MOST_SEED),
    "guard.spike_window": (2, math.inf),
    "schedule.decay_fraction": (0, 1),
    "schedule.min_lr_ratio": (0, 1),
}


@dataclass(frozen=True, config=STRICT)
class TrainConfig:
    """A whole run. `python -m megatron_tn.train` writes it, resolved, to run_dir/config.json."""

    run_dir: str = "runs/default"
    seed: int = 0
    nodes: int = 1
    stop_after: int = 0  # end after this step, saved and within the same schedule; 0: after schedule.steps
    deterministic: bool = False  # bitwise repeatable kernels, at some cost in speed
    distributed_timeout_s: int = 1800  # of any collective, and of what may take long: starting, compiling, evaluating
    # A rank that has not moved for so long makes the run end, with the rank that all wait for named; 0: never.
    hang_timeout_s: int = 600
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    logging: LoggingConfig = dataclasses.field(default_factory=LoggingConfig)
    cluster: ClusterConfig = dataclasses.field(default_factory=ClusterConfig)

    @property
    def last_step(self) -> int:
        """The step after which this process is done."""
        return min(self.stop_after or self.schedule.steps, self.schedule.steps)

    def problems(self, world_size: int | None = None) -> list[str]:
        """Every relation between settings that does not hold, one line each (empty when all is well).

        `world_size` adds the relations to the number of processes; without it they are left out.
        """
        tp, cp = self.parallel.tp, self.parallel.cp
        found = [f"parallel.{name}={size} must be at least 1" for name, size in (("tp", tp), ("cp", cp)) if size < 1]
        if found:
            return found
        if not self.run_dir.strip():
            found.append(f"run_dir={self.run_dir!r} must name a folder: the run's files would lie in the current one")
        found += self.model.problems(tp)
        if self.parallel.sequence_parallel and tp == 1:
            found.append(
                "parallel.sequence_parallel=true shares tokens out over tensor-parallel ranks, but parallel.tp=1"
            )
        data = self.data
        for name, (least, most) in BOUNDS.items():
            value = functools.reduce(getattr, name.split("."), self)
            if not least <= value <= most:
                allowed = f"at least {least}" if most == math.inf else f"from {least} to {most}"
                found.append(f"{name}={value} must be {allowed}")
        try:
            last = max((last for _, last in data.skip_ranges), default=0)
            if last > self.schedule.steps:
                found.append(f"data.skip_batches: {last} is past schedule.steps={self.schedule.steps}")
        except ValueError as error:
            found.append(str(error))
        if not 0 <= self.hang_timeout_s < self.distributed_timeout_s:
            found.append(
                f"hang_timeout_s={self.hang_timeout_s} must be from 0 to below distributed_timeout_s="
                f"{self.distributed_timeout_s}: collectives that give up first would hide the rank they waited for"
            )
        if self.checkpoint.keep_best and not (self.evaluation.manifest and self.evaluation.every):
            found.append(
                f"checkpoint.keep_best={self.checkpoint.keep_best} needs held-out losses: set evaluation.manifest and "
                "evaluation.every"
            )
        elif self.checkpoint.keep_best and min(self.checkpoint.every, self.evaluation.every) > 0:
            both = math.lcm(self.checkpoint.every, self.evaluation.every)
            if both > self.schedule.steps:
                found.append(
                    f"checkpoint.keep_best={self.checkpoint.keep_best} keeps what is saved and evaluated at one step, "
                    f"but the first multiple of checkpoint.every={self.checkpoint.every} and evaluation.every="
                    f"{self.evaluation.every} is {both}, past schedule.steps={self.schedule.steps}"
                )
        if data.sequence_length < cp:
            found.append(f"data.sequence_length={data.sequence_length} is smaller than parallel.cp={cp}")
        if self.schedule.warmup_steps >= self.schedule.steps > 0:
            found.append(
                f"schedule.warmup_steps={self.schedule.warmup_steps} must be below schedule.steps={self.schedule.steps}"
            )
        if self.optim.fused == "apex" and self.engine.name == "deepspeed" and self.engine.zero_stage == 0:
            found.append(
                "optim.fused=apex does not go with engine.zero_stage=0, where DeepSpeed flattens apex's masters"
            )
        found += self.engine.problems(cp)
        for name in ("lr", "eps"):
            if not 0 < (value := getattr(self.optim, name)) < math.inf:
                found.append(f"optim.{name}={value} must be above 0, and finite")
        for name in ("model.norm_eps", "model.init_std", "optim.weight_decay"):
            if functools.reduce(getattr, name.split("."), self) == math.inf:
                found.append(f"{name}=inf must be finite")
        for name in ("bf16_tflops", "memory_bandwidth_gbs", "interconnect_gbs"):
            value = getattr(self.cluster, name)
            if value is not None and not 0 < value < math.inf:
                found.append(f"cluster.{name}={value} must be above 0, and finite, or null where it is not known")
        for name in ("beta1", "beta2"):
            if not 0 <= (value := getattr(self.optim, name)) < 1:
                found.append(f"optim.{name}={value} must be from 0 to below 1")
        if world_size:
            if world_size % (tp * cp):
                found.append(
                    f"world size {world_size} is not a multiple of parallel.tp={tp} x parallel.cp={cp} = {tp * cp}"
                )
            elif data.micro_batch > 0 and data.global_batch > 0:
                dp = world_size // (tp * cp)
                if data.global_batch % (data.micro_batch * dp):
                    found.append(
                        f"data.global_batch={data.global_batch} is not a multiple of data.micro_batch="
                        f"{data.micro_batch} x data-parallel size {dp} = {data.micro_batch * dp}"
                    )
                found += self.schedule.ramp_problems(data.global_batch, data.micro_batch * dp)
        return found


def load(path: Path, kind: type = TrainConfig) -> Any:
    """Read a config written by `save`. Raises ConfigError."""
    return from_mapping(kind, read_mapping(path))
