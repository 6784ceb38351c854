"""Measure one rank's tensor-parallel slice of a model's blocks on one GPU, and what its whole model would take.

python -m megatron_tn.benchmarking.block model=175b parallel.tp=8 parallel.sequence_parallel=true \
    engine.cuda_graph=true data.sequence_length=8192 cluster=h200_141g benchmark.output=rows.jsonl

Forward and backward pass are timed with two and with six layers, with local copies of the right size in place of
collectives: block = (t6 - t2) / 4, and t2 - 2 block is embedding and head. The time of a microbatch is that of all
layers plus the predicted time of the collectives; the table shows it beside the plan's time, and the peak memory of six
layers beside its plan. Without a CUDA graph the time of a small block is that of its kernel launches on the host.
"""

import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.table import Table

from kernels.bench import rows
from megatron_tn.benchmarking.clock import release, sampled
from megatron_tn.benchmarking.local_copies import world_of_copies
from megatron_tn.benchmarking.measure import random_tokens
from megatron_tn.benchmarking.result import layout_of
from megatron_tn.cli import command, run_program
from megatron_tn.cli.tables import table_console
from megatron_tn.config import BenchmarkConfig, ConfigError
from megatron_tn.device.matrix_rate import mark
from megatron_tn.engine.build import build_engine
from megatron_tn.planning.estimate import GIB, plan_memory
from megatron_tn.planning.microbatch import extrapolated
from megatron_tn.planning.speed import StepTime, missing_rates, step_time

REST = "embedding, first layer's LRPE and head"
FEW = (2, 6)  # layers of the two runs; the first layer alone has LRPE


@dataclass(frozen=True)
class Slice:
    """Milliseconds of a microbatch's forward and backward pass of so many layers, its peak GiB, the matrix rate."""

    layers: int
    milliseconds: float
    peak_gib: float
    sampled_tflops: float


def measure(config: BenchmarkConfig, layers: int, device: torch.device) -> Slice:
    """This rank's slice of a model of `layers` layers in the local engine, without its update."""
    release()
    engine_config = replace(config.engine, name="local")
    short = replace(config, model=config.model.shortened(layers), engine=engine_config)
    with world_of_copies(config.parallel) as context:
        engine = build_engine(short, context, device)
        for owned in engine.owned_ranges():
            owned.values["param"].normal_(0, config.model.init_std)
        engine.refresh(optimizer_step=0)
        tokens, targets = random_tokens(short, device)
        # Only ids of this rank's slice of the vocabulary: no other rank adds to the zeros that the embedding gives for
        # others, and products of zeros take less power, so that the GPU's clock rises.
        tokens %= config.model.vocab_size // config.parallel.tp
        scale = torch.tensor(1 / tokens.numel(), device=device)

        def step() -> list:
            marks = [mark(device)]
            engine.forward_backward(tokens, targets, None, scale=scale, last=True)
            engine.phase.take()  # the next pass overwrites the gradients
            marks.append(mark(device))
            return marks

        times, rate, peak = sampled(step, config.benchmark.steps, device)
    return Slice(layers, statistics.median(each[0] for each in times), peak, rate)


def block_of(few: Slice, more: Slice) -> float:
    """Milliseconds of one block, from runs with few and with more layers."""
    return (more.milliseconds - few.milliseconds) / (more.layers - few.layers)


def planned(config: BenchmarkConfig) -> tuple[StepTime, float]:
    """One microbatch of all layers, and the allocator's peak GiB of the larger run, in a world of tp processes."""
    data = replace(config.data, global_batch=config.data.micro_batch)
    one, ranks = replace(config, data=data, engine=replace(config.engine, name="local")), config.parallel.tp
    short = replace(one, model=config.model.shortened(FEW[-1]))
    return step_time(one, ranks, extrapolated(one)), plan_memory(short, ranks).reserved / GIB


def benchmark(config: BenchmarkConfig) -> None:
    unknown = missing_rates(config.cluster)
    if problems := [*config.problems(), *(f"{name} is not known: set it or cluster=h200_141g" for name in unknown)]:
        raise ConfigError(problems)
    if config.model.layers < FEW[-1] or config.parallel.cp > 1:
        raise ConfigError(
            f"model.layers={config.model.layers} must be at least {FEW[-1]}, and parallel.cp={config.parallel.cp} must "
            "be 1: a block is timed without other slices of its sequences"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan, plan_peak = planned(config)
    few, more = (measure(config, layers, device) for layers in FEW)
    block, layers = block_of(few, more), config.model.layers
    here = few.milliseconds + (layers - few.layers) * block
    wired = here + 1e3 * plan.tensor_parallel
    tokens = config.data.micro_batch * config.data.sequence_length
    values = {
        "block": block,
        REST: few.milliseconds - few.layers * block,
        "all layers": here,
        "all layers + predicted collectives": wired,
        "the plan's microbatch": 1e3 * plan.passes,
    }
    table = Table("one rank's slice", "ms", "tokens/s per GPU")
    for name, value in values.items():
        rate = 1e3 * tokens / config.parallel.tp / value if name not in ("block", REST) else None
        table.add_row(name, f"{value:.2f}", f"{rate:,.0f}" if rate else "")
    console = table_console()
    console.print(table)
    console.print(
        f"the plan is {100 * (1e3 * plan.passes / wired - 1):+.1f} % off; 8192^3 product {more.sampled_tflops:.0f} "
        f"TFLOP/s; peak of {more.layers} layers {more.peak_gib:.1f} GiB, planned {plan_peak:.1f}"
    )
    if config.benchmark.output:
        same = {"model": config.model.name, **layout_of(config, config.parallel.tp), "tokens": tokens}
        same |= {"sampled_tflops": more.sampled_tflops, "peak_gib": more.peak_gib, "plan_peak_gib": plan_peak}
        found = [rows.row(f"slice: {name}", "ms", value, **same) for name, value in values.items()]
        rows.append(Path(config.benchmark.output), found)


main = command(BenchmarkConfig, "benchmark")(benchmark)

if __name__ == "__main__":
    run_program(main)
