"""What a run would need, without starting it: memory of the model's state per rank, and operations per token.

python -m megatron_tn.plan model=7b parallel.tp=8 engine=zero1 cluster=a100_80g nodes=16
"""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from megatron_tn.cli import command
from megatron_tn.config import ConfigError, TrainConfig
from megatron_tn.model.flops import forward_flops_per_token, parameter_count, training_flops_per_token
from megatron_tn.planning.memory import GIB, state_bytes


@command(TrainConfig, "config")
def main(config: TrainConfig) -> None:
    world = config.nodes * max(config.cluster.gpus_per_node, 1)
    if problems := config.problems(world):
        raise ConfigError(problems)
    console = Console(highlight=False)
    layout = f"{world} processes: tp {config.parallel.tp} x dp {world // config.parallel.tp}"
    console.print(f"{config.model.name}: {parameter_count(config.model):,} parameters; {layout}")
    memory = Table("state of the model, per rank", "GiB", title_justify="left")
    kinds = state_bytes(config, world)
    for kind, size in [*kinds.items(), ("all (activations come on top)", sum(kinds.values()))]:
        memory.add_row(kind, f"{size / GIB:.2f}")
    console.print(memory)
    flops = Table("operations", "GFLOP a token")
    for part, count in forward_flops_per_token(config.model).items():
        flops.add_row(part, f"{count / 1e9:.3f}")
    flops.add_row("forward and backward", f"{training_flops_per_token(config.model) / 1e9:.3f}")
    console.print(flops)
    if 0 < config.cluster.gpu_memory_gib < sum(kinds.values()) / GIB:
        raise ConfigError(
            f"the model's state needs {sum(kinds.values()) / GIB:.1f} GiB a rank, but "
            f"cluster.gpu_memory_gib={config.cluster.gpu_memory_gib}: raise parallel.tp, nodes or engine.zero_stage"
        )


if __name__ == "__main__":
    main()
