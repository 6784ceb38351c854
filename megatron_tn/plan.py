"""Estimate a run without starting it: peak memory per rank, by kind, and FLOPs per token.

python -m megatron_tn.plan model=7b parallel.tp=8 engine=zero1 cluster=a100_80g nodes=16
"""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from megatron_tn.cli import command
from megatron_tn.config import ConfigError, TrainConfig
from megatron_tn.model.registry import forward_flops_per_token, parameter_count, training_flops_per_token
from megatron_tn.planning.estimate import GIB, plan_memory
from megatron_tn.planning.remedies import memory_problems


@command(TrainConfig, "config")
def main(config: TrainConfig) -> None:
    world = config.nodes * max(config.cluster.gpus_per_node, 1)
    if problems := config.problems(world):
        raise ConfigError(problems)
    console = Console(highlight=False, markup=False)
    tp, cp = config.parallel.tp, config.parallel.cp
    layout = f"{world} processes: tp {tp} x cp {cp} x dp {world // (tp * cp)}"
    console.print(f"{config.model.name}: {parameter_count(config.model):,} parameters; {layout}")
    plan = plan_memory(config, world)
    memory = Table("peak memory, per rank", "GiB", title_justify="left")
    for kind, size in plan.kinds.items():
        memory.add_row(kind, f"{size / GIB:.2f}")
    memory.add_section()
    memory.add_row("reserved by the allocator", f"{plan.reserved / GIB:.2f}")
    memory.add_row("all", f"{plan.total / GIB:.2f}")
    console.print(memory)
    flops = Table("operations", "GFLOP a token")
    training_flops = training_flops_per_token(config.model, config.data.sequence_length)
    for part, count in forward_flops_per_token(config.model, config.data.sequence_length).items():
        flops.add_row(part, f"{count / 1e9:.3f}")
    flops.add_row("forward and backward", f"{training_flops / 1e9:.3f}")
    console.print(flops)
    if problems := memory_problems(config, world):
        raise ConfigError(problems)


if __name__ == "__main__":
    main()
