"""The measurements of `python -m megatron_tn.benchmark`: engine steps, then the peer model, then the training loop."""

import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.stream.bench import write_shards
from kernels import linear_cross_entropy
from megatron_tn.benchmarking.clock import peak_gib, release, sampled
from megatron_tn.benchmarking.peers import llama
from megatron_tn.benchmarking.result import LOOP, STEP, WITH_OPTIMIZER, Result, layout_of, peer_layout
from megatron_tn.config import LOOP_WARM_UP, BenchmarkConfig, TrainConfig, from_mapping, to_mapping
from megatron_tn.device.matrix_rate import Marks, mark
from megatron_tn.engine.build import build_engine
from megatron_tn.model.registry import parameter_count
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.parallel.world import join_world, leave_world, world_size
from megatron_tn.train import train
from megatron_tn.training.run_folder import RunFolder


def measure(config: BenchmarkConfig) -> Iterator[Result]:
    device = join_world(config.distributed_timeout_s)
    try:
        for found in engine_results(config, device):
            rate = found.sampled_tflops
            yield found
        if config.benchmark.loop_steps:
            shards = Path(config.run_dir) / "shards"
            if dist.get_rank() == 0:
                write_random_shards(config, shards)
            dist.barrier()
    finally:
        leave_world()  # also frees the engine's memory
    if config.benchmark.peer == "llama":
        yield from (peer_result(config, device, whole=whole) for whole in (False, True))
    if config.benchmark.loop_steps:
        yield loop_result(config, shards, rate)


def engine_results(config: BenchmarkConfig, device: torch.device) -> Iterator[Result]:
    """The results STEP and WITH_OPTIMIZER of the config's engine, on random tokens and weights."""
    context = ParallelContext.create(
        config.parallel.tp, config.parallel.cp, sequence_parallel=config.parallel.sequence_parallel
    )
    engine = build_engine(config, context, device)
    specs = engine.model.shard_specs()
    for owned in engine.owned_ranges():
        values, is_norm = owned.values["param"], len(specs[owned.name].shape) == 1
        values.fill_(1) if is_norm else values.normal_(0, config.model.init_std)
    engine.refresh(optimizer_step=0)
    data = config.data
    tokens, targets = random_tokens(config, device)
    microbatches = data.global_batch // (data.micro_batch * context.dp.size)
    scale = torch.tensor(1 / (data.global_batch * data.sequence_length), device=device)

    def step() -> Marks:
        marks = [mark(device)]
        for index in range(microbatches):
            engine.forward_backward(tokens, targets, None, scale=scale, last=index == microbatches - 1)
        marks.append(mark(device))
        engine.step(1e-5)
        marks.append(mark(device))
        return marks

    times, rate, peak = sampled(step, config.benchmark.steps, device)
    for name, milliseconds in ((STEP, [t[0] for t in times]), (WITH_OPTIMIZER, [sum(t) for t in times])):
        yield _result(config, name, context.world_size, statistics.median(milliseconds), rate, peak)


def peer_result(config: BenchmarkConfig, device: torch.device, *, whole: bool) -> Result:
    """The result STEP of a LLaMA with sdpa and this package's cross-entropy. whole: torch.compile the whole model (then
    transformers passes sdpa a mask, which rules out sdpa's fastest kernels); else compile each layer."""
    release()
    model = llama(config.model, device)
    for part in [model] if whole else model.layers:
        part.compile()
    tokens, targets = random_tokens(config, device)

    def step() -> Marks:
        for parameter in model.parameters():
            parameter.grad = None
        marks = [mark(device)]
        hidden = model(input_ids=tokens, use_cache=False).last_hidden_state
        loss, _ = linear_cross_entropy(hidden.flatten(0, 1), model.embed_tokens.weight, targets.flatten())
        (loss / targets.numel()).backward()
        marks.append(mark(device))
        return marks

    times, rate, peak = sampled(step, config.benchmark.steps, device)
    return Result(
        name=STEP,
        model=f"llama as {config.model.name}",
        layout=peer_layout(config, "compiled whole" if whole else "layers compiled"),
        tokens=tokens.numel(),
        milliseconds=statistics.median(t[0] for t in times),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        sampled_tflops=rate,
        datasheet_tflops=datasheet_tflops(config),
        peak_gib=peak,
    )


def loop_result(config: BenchmarkConfig, shards: Path, rate: float) -> Result:
    """The result LOOP on random documents: median tokens/s of the journal's records after the first LOOP_WARM_UP.

    rate: the matrix rate sampled during `engine_results`. It cannot be sampled between steps of the training loop, and
    after the loop the GPU has idled during teardown.
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
    records = RunFolder(run_dir).records("tokens_per_second")
    speeds = [record["tokens_per_second"] for record in records][LOOP_WARM_UP:]
    if not speeds:
        raise RuntimeError(f"the training loop was stopped after {len(records)} steps; {LOOP_WARM_UP + 1} are needed")
    milliseconds = 1e3 * data.global_batch * data.sequence_length / statistics.median(speeds)
    return _result(config, LOOP, world_size(), milliseconds, rate, peak_gib())


def _result(config: BenchmarkConfig, name: str, gpus: int, milliseconds: float, rate: float, peak: float) -> Result:
    return Result(
        name=name,
        model=config.model.name,
        layout=layout_of(config, gpus),
        tokens=config.data.global_batch * config.data.sequence_length,
        milliseconds=milliseconds,
        parameters=parameter_count(config.model),
        sampled_tflops=rate,
        datasheet_tflops=datasheet_tflops(config),
        peak_gib=peak,
    )


def datasheet_tflops(config: TrainConfig) -> float | None:
    return config.cluster.peak_tflops(torch.cuda.get_device_name() if torch.cuda.is_available() else None)


def write_random_shards(config: BenchmarkConfig, folder: Path) -> None:
    """Write enough documents of random tokens for benchmark.loop_steps steps."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = config.benchmark.loop_steps * config.data.global_batch * (config.data.sequence_length + 1)
    write_shards(folder, shards=4, shard_tokens=max(tokens // 4, 20_000), vocab_size=config.model.vocab_size)


def random_tokens(config: BenchmarkConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets of one microbatch, int64 [micro_batch, sequence_length]. All ranks get the
    same tokens: under context parallelism the model takes its slice."""
    shape = (config.data.micro_batch, config.data.sequence_length)
    draw = torch.Generator(device).manual_seed(config.seed)
    return tuple(torch.randint(3, config.model.vocab_size, shape, device=device, generator=draw) for _ in range(2))
