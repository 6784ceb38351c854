"""Measure one rank's tensor-parallel slice of a model's blocks on one GPU, and what its whole model would take.

python -m megatron_tn.benchmarking.block model=175b parallel.tp=8 parallel.sequence_parallel=true \
    data.sequence_length=8192 data.micro_batch=1 cluster=h200_141g benchmark.output=rows.jsonl

Forward and backward pass of two and of three layers, with collectives as local copies of the right size: their
difference is one block, the rest embedding and head. All layers, and the predicted time of the collectives, make a
microbatch; beside it stands the plan's.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from kernels.bench import rows
from megatron_tn.benchmarking.clock import release, sampled
from megatron_tn.benchmarking.local_copies import world_of_copies
from megatron_tn.benchmarking.measure import random_tokens
from megatron_tn.benchmarking.result import layout_of
from megatron_tn.cli import command, run_program
from megatron_tn.config import BenchmarkConfig, ConfigError
from megatron_tn.device.matrix_rate import mark
from megatron_tn.engine.build import build_engine
from megatron_tn.planning.microbatch import extrapolated
from megatron_tn.planning.speed import StepTime, missing_rates, step_time

REST = "embedding, first layer's LRPE and head"
FEW = (2, 3)  # layers of the two runs; the first layer alone has LRPE


@dataclass(frozen=True)
class Slice:
    """Milliseconds of a microbatch's forward and backward pass of so many layers, its peak GiB, the matrix rate."""

    layers: int
    milliseconds: float
    peak_gib: float
    sampled_tflops: float


def measure(config: BenchmarkConfig, layers: int, device: torch.device) -> Slice:
    """This rank's slice of a model of `layers` layers in the local engine, without its update."""
    engine_config = replace(config.engine, name="local")
    short = replace(config, model=config.model.shortened(layers), engine=engine_config)
    with world_of_copies(config.parallel) as context:
        engine = build_engine(short, context, device)
        for owned in engine.owned_ranges():
            owned.values["param"].normal_(0, config.model.init_std)
        engine.refresh(optimizer_step=0)
        tokens, targets = random_tokens(short, device)
        scale = torch.tensor(1 / tokens.numel(), device=device)

        def step() -> list:
            marks = [mark(device)]
            engine.forward_backward(tokens, targets, None, scale=scale, last=True)
            engine.phase.take()  # the next pass overwrites the gradients
            marks.append(mark(device))
            return marks

        times, rate, peak = sampled(step, config.benchmark.steps, device)
    release()
    return Slice(layers, statistics.median(each[0] for each in times), peak, rate)


def whole_model(two: Slice, three: Slice, layers: int) -> float:
    """Milliseconds of all layers, embedding and head."""
    return two.milliseconds + (layers - two.layers) * (three.milliseconds - two.milliseconds)


def planned(config: BenchmarkConfig) -> StepTime:
    """Of one microbatch, in a world of tp processes."""
    one = replace(config, data=replace(config.data, global_batch=config.data.micro_batch))
    return step_time(replace(one, engine=replace(config.engine, name="local")), config.parallel.tp, extrapolated(one))


def benchmark(config: BenchmarkConfig) -> None:
    if problems := [*config.problems(), *(f"{name} is not known" for name in missing_rates(config.cluster))]:
        raise ConfigError(problems)
    if config.model.layers < FEW[1] or config.parallel.cp > 1:
        raise ConfigError(f"model.layers={config.model.layers} must be at least {FEW[1]}, and parallel.cp 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = planned(config)
    two, three = (measure(config, layers, device) for layers in FEW)
    here = whole_model(two, three, config.model.layers)
    wired = here + 1e3 * plan.tensor_parallel
    tokens = config.data.micro_batch * config.data.sequence_length
    values = {
        "block": three.milliseconds - two.milliseconds,
        REST: two.milliseconds - 2 * (three.milliseconds - two.milliseconds),
        "all layers": here,
        "all layers + predicted collectives": wired,
        "the plan's microbatch": 1e3 * plan.passes,
    }
    table = Table("one rank's slice", "ms", "tokens/s per GPU")
    for name, value in values.items():
        rate = 1e3 * tokens / config.parallel.tp / value if name not in ("block", REST) else None
        table.add_row(name, f"{value:.2f}", f"{rate:,.0f}" if rate else "")
    console = Console(highlight=False, markup=False)
    console.print(table)
    console.print(
        f"peak of {three.layers} layers {three.peak_gib:.1f} GiB; 8192^3 product {three.sampled_tflops:.0f} TFLOP/s; "
        f"the plan is {100 * (1e3 * plan.passes / wired - 1):+.1f} % off"
    )
    if config.benchmark.output:
        same = {"model": config.model.name, **layout_of(config, config.parallel.tp), "peak_gib": three.peak_gib}
        same |= {"tokens": tokens, "sampled_tflops": three.sampled_tflops}
        found = [rows.row(f"slice: {name}", "ms", value, **same) for name, value in values.items()]
        rows.append(Path(config.benchmark.output), found)


main = command(BenchmarkConfig, "benchmark")(benchmark)

if __name__ == "__main__":
    run_program(main)
