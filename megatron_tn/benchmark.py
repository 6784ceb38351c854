"""How fast a config trains on this machine, beside the matrix rate of the same minutes and a model of the same shape.

python -m megatron_tn.benchmark model=1b engine=zero1 engine.compile=blocks data.micro_batch=8 data.global_batch=8 \
    benchmark.peer=llama benchmark.loop_steps=40
torchrun --nproc-per-node 2 -m megatron_tn.benchmark model=7b parallel.tp=2 ...

Utilisation is 6 x parameters x tokens/s over the bf16 rate of an 8192^3 matrix product, sampled between the steps that
it is held against, and as long as the GPU's power allows for, as training does: the first products after a pause run at
clocks that it does not keep up for a tenth of a second.
"step" is forward, loss and backward; "with optimizer" adds one update a step; "loop" is the training command itself,
its journal's tokens/s, with data, logging and everything else.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from data_pipeline.stream.bench import write_shards
from kernels import linear_cross_entropy
from megatron_tn.cli import command, run_program
from megatron_tn.config import (
    LOOP_WARM_UP,
    BenchmarkConfig,
    ConfigError,
    ModelConfig,
    TrainConfig,
    from_mapping,
    to_mapping,
)
from megatron_tn.engine.build import build_engine
from megatron_tn.model.registry import parameter_count
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.parallel.world import join_world, leave_world, world_size
from megatron_tn.train import train

GIB = 2**30
WARM_UP = 4  # steps: the compilers are done after two, the allocator after three
GROUP = 4  # steps in a row between two samples of the matrix rate


@dataclasses.dataclass
class Row:
    """One measured model. Times in milliseconds of one rank, tokens of all ranks."""

    name: str
    part: str
    ranks: int
    sequence_length: int
    tokens: int
    milliseconds: float
    parameters: int
    matmul_tflops: float
    peak_gib: float

    @property
    def tokens_per_second(self) -> float:
        return 1e3 * self.tokens / self.milliseconds

    @property
    def utilisation(self) -> float:
        return 6 * self.parameters * self.tokens_per_second / self.ranks / (1e12 * self.matmul_tflops)


def benchmark(config: BenchmarkConfig) -> None:
    if problems := config.problems(world_size()):
        raise ConfigError(problems)
    first = int(os.environ.get("RANK", 0)) == 0
    rows = []
    try:
        for row in measure(config):
            rows.append(row)
            if first and config.benchmark.output:
                derived = {"tokens_per_second": row.tokens_per_second, "utilisation": row.utilisation}
                with open(config.benchmark.output, "a") as file:
                    file.write(json.dumps(dataclasses.asdict(row) | derived) + "\n")
    finally:  # what was measured is not lost with what comes after it
        if first and rows:
            show(rows)


def show(rows: list[Row]) -> None:
    table = Table("model", "what", "N", "tokens a step", "ms", "tokens/s", "utilisation", "of TFLOP/s", "peak GiB")
    for row in rows:
        table.add_row(
            row.name,
            row.part,
            str(row.sequence_length),
            str(row.tokens),
            f"{row.milliseconds:.1f}",
            f"{row.tokens_per_second:,.0f}",
            f"{100 * row.utilisation:.1f} %",
            f"{row.matmul_tflops:.0f}",
            f"{row.peak_gib:.1f}",
        )
    Console(highlight=False, width=140).print(table)


def measure(config: BenchmarkConfig) -> Iterator[Row]:
    """The rows of one config, in the order they are measured."""
    device = join_world(config.distributed_timeout_s)
    try:
        for row in engine_rows(config, device):
            rate = row.matmul_tflops
            yield row
        if config.benchmark.loop_steps:
            shards = Path(config.run_dir) / "shards"
            if dist.get_rank() == 0:
                write_random_shards(config, shards)
            dist.barrier()
    finally:
        leave_world()  # and with it the engine's memory
    if config.benchmark.peer == "llama":
        yield from (peer_row(config, device, whole) for whole in (False, True))
    if config.benchmark.loop_steps:
        yield loop_row(config, shards, rate)


def engine_rows(config: BenchmarkConfig, device: torch.device) -> Iterator[Row]:
    """Forward, loss and backward, and the same with the update, of the config's engine on random tokens."""
    context = ParallelContext.create(
        config.parallel.tp, config.parallel.cp, sequence_parallel=config.parallel.sequence_parallel
    )
    engine = build_engine(config, context, device)
    for owned in engine.owned_ranges():
        owned.values["param"].normal_(0, config.model.init_std)
    engine.refresh(optimizer_step=0)
    data = config.data
    tokens, targets = random_tokens(config, device)
    microbatches = data.global_batch // (data.micro_batch * context.dp.size)
    scale = torch.tensor(1 / (data.global_batch * data.sequence_length), device=device)

    def step() -> list:
        marks = [mark(device)]
        for index in range(microbatches):
            engine.forward_backward(tokens, targets, None, scale=scale, last=index == microbatches - 1)
        marks.append(mark(device))
        engine.step(1e-5)
        marks.append(mark(device))
        return marks

    times, rate, peak = sampled(step, config.benchmark.steps, device)
    shared = (
        context.world_size,
        data.sequence_length,
        data.global_batch * data.sequence_length,
    )
    rest = (parameter_count(config.model), rate, peak)
    yield Row(config.model.name, "step", *shared, statistics.median(t[0] for t in times), *rest)
    yield Row(config.model.name, "with optimizer", *shared, statistics.median(sum(t) for t in times), *rest)


def peer_row(config: BenchmarkConfig, device: torch.device, whole: bool) -> Row:
    """Forward, loss and backward of a Hugging Face LLaMA of the same shape: compiled, sdpa, fused cross-entropy.

    whole: compiled as one, and then it gives sdpa a mask, which the fastest kernels do not take; else layer by layer.
    """
    release()
    model = llama(config.model, device)
    for part in [model] if whole else model.layers:
        part.compile()
    tokens, targets = random_tokens(config, device)

    def step() -> list:
        for parameter in model.parameters():
            parameter.grad = None
        marks = [mark(device)]
        hidden = model(input_ids=tokens, use_cache=False).last_hidden_state
        loss, _ = linear_cross_entropy(hidden.flatten(0, 1), model.embed_tokens.weight, targets.flatten())
        (loss / targets.numel()).backward()
        marks.append(mark(device))
        return marks

    times, rate, peak = sampled(step, config.benchmark.steps, device)
    count = sum(parameter.numel() for parameter in model.parameters())
    median = statistics.median(t[0] for t in times)
    name = f"llama, {'compiled whole' if whole else 'layers compiled'}"
    return Row(name, "step", 1, config.data.sequence_length, tokens.numel(), median, count, rate, peak)


def llama(shape: ModelConfig, device: torch.device) -> torch.nn.Module:
    """The decoder of a Hugging Face LLaMA with this model's sizes, bf16.

    Raises:
        ConfigError: transformers is not installed.
    """
    try:
        from transformers import LlamaConfig, LlamaModel
    except ImportError:
        raise ConfigError("benchmark.peer=llama needs transformers: pip install transformers") from None
    sizes = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.embed_dim,
        intermediate_size=shape.glu_dim,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=2**20,
        attn_implementation="sdpa",
    )
    with torch.device(device):
        return LlamaModel(sizes).to(torch.bfloat16)


def loop_row(config: BenchmarkConfig, shards: Path, rate: float) -> Row:
    """The training command on random documents: the median of its journal's later records.

    rate: that of the steps measured before, since nothing can be sampled between these. After them it would be that of
    a GPU which has rested while the run was taken down.
    """
    release()
    data = config.data
    run_dir = Path(config.run_dir) / "loop"
    values = to_mapping(config)
    del values["benchmark"]
    values["run_dir"] = str(run_dir)
    values["data"] |= {"manifest": str(shards / "manifest.json")}
    values["schedule"] |= {"steps": config.benchmark.loop_steps, "warmup_steps": 0}
    values["checkpoint"] |= {"resume": "none", "every": 0, "at_end": False}
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    train(from_mapping(TrainConfig, values))
    records = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    speeds = [record["tokens_per_second"] for record in records if "tokens_per_second" in record][LOOP_WARM_UP:]
    if not speeds:
        raise RuntimeError(
            f"the training command was stopped after {len(records)} steps; {LOOP_WARM_UP + 1} are needed"
        )
    tokens = data.global_batch * data.sequence_length
    return Row(
        config.model.name,
        "loop",
        world_size(),
        data.sequence_length,
        tokens,
        1e3 * tokens / statistics.median(speeds),
        parameter_count(config.model),
        rate,
        peak_gib(),
    )


def write_random_shards(config: BenchmarkConfig, folder: Path) -> None:
    """Enough documents of random tokens for one pass of the training loop."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = config.benchmark.loop_steps * config.data.global_batch * (config.data.sequence_length + 1)
    write_shards(folder, shards=4, shard_tokens=max(tokens // 4, 100_000), vocab_size=config.model.vocab_size)


def random_tokens(config: BenchmarkConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets of one microbatch, int64 [micro_batch, sequence_length]; context-parallel ranks get the same
    and the model cuts its slice."""
    shape = (config.data.micro_batch, config.data.sequence_length)
    draw = torch.Generator(device).manual_seed(config.seed)
    return tuple(torch.randint(3, config.model.vocab_size, shape, device=device, generator=draw) for _ in range(2))


def sampled(step: Callable[[], list], count: int, device: torch.device) -> tuple[list[list[float]], float, float]:
    """`count` steps' times, the median matrix rate between them, and the peak of memory in GiB.

    step: runs one and gives its marks. The host does not wait between steps, beyond what they wait for themselves, as
    in training.
    """
    for _ in range(WARM_UP):
        elapsed(step())
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times, peak, rates = [], 0.0, []
    while len(times) < count:
        peak = max(peak, peak_gib())
        rates.append(matmul_tflops(device))
        _, *group = [step() for _ in range(1 + GROUP)]  # the first finds an idle queue
        times += [elapsed(marks) for marks in group]
    return times[:count], statistics.median(rates), max(peak, peak_gib())


def matmul_tflops(device: torch.device) -> float:
    """Rate that a bf16 matrix product keeps up, TFLOP/s. On a CPU of a small one: it only fills the column there."""
    size, settling, repeats = (8192, 60, 100) if device.type == "cuda" else (512, 1, 5)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    marks = [mark(device)]
    for _ in range(settling + repeats):
        a @ b
        marks.append(mark(device))
    return 2 * size**3 / statistics.median(elapsed(marks)[settling:]) / 1e9


def mark(device: torch.device) -> torch.cuda.Event | float:
    if device.type != "cuda":
        return 1e3 * time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed(marks: list) -> list[float]:
    """Milliseconds from mark to mark; waits for the device."""
    if isinstance(marks[0], float):
        return [b - a for a, b in itertools.pairwise(marks)]
    marks[-1].synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]


def peak_gib() -> float:
    """Peak of what the allocator held from the device since the last reset; 0 on a CPU."""
    return torch.cuda.max_memory_reserved() / GIB if torch.cuda.is_available() else 0.0


def release() -> None:
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


main = command(BenchmarkConfig, "benchmark")(benchmark)

if __name__ == "__main__":
    run_program(main)
