"""Measure a config's training speed on this machine: tokens/s and utilisation, optionally beside a peer model.

python -m megatron_tn.benchmark model=1b engine=zero1 engine.cuda_graph=true data.micro_batch=8 data.global_batch=8 \
    benchmark.peer=llama benchmark.loop_steps=40 benchmark.output=rows.jsonl
torchrun --nproc-per-node 2 -m megatron_tn.benchmark model=7b parallel.tp=2 ...

"step" is forward, loss and backward; "step + optimizer" adds the optimizer step; "training loop" is the training
command with data and logging, at the tokens/s of its journal.

Utilisation = 6 x parameters x tokens/s per GPU / bf16 matrix rate; recomputation is not counted. The rate is measured
with an 8192^3 product between the steps (utilisation_sampled), or the datasheet's dense peak (utilisation_datasheet).

With benchmark.output each row is appended as one JSON object, with commit, command and machine (kernels/bench/rows.py).
`python -m launch.render_table` makes the table of docs/performance.md from such rows.
"""

from pathlib import Path

import torch

from kernels.bench import rows
from megatron_tn.benchmarking.measure import measure
from megatron_tn.benchmarking.result import Result, show
from megatron_tn.cli import command, is_first_process, run_program
from megatron_tn.config import BenchmarkConfig, ConfigError, device_problems
from megatron_tn.parallel.world import processes_here, world_size
from megatron_tn.planning.host import host_memory_problems


def benchmark(config: BenchmarkConfig) -> None:
    cuda, size = torch.cuda.is_available(), world_size()
    problems = [*config.problems(size), *device_problems(config, cuda=cuda)]
    if not problems and not cuda:
        problems = host_memory_problems(config, size, processes_here())
    if problems:
        raise ConfigError(problems)
    first = is_first_process()
    results: list[Result] = []
    try:
        for found in measure(config):
            results.append(found)
            if first and config.benchmark.output:
                rows.append(Path(config.benchmark.output), [found.row()])
    finally:  # show the results measured before a failure
        if first and results:
            show(results)


main = command(BenchmarkConfig, "benchmark")(benchmark)

if __name__ == "__main__":
    run_program(main)
