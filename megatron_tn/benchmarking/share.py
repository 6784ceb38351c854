"""Initialise one rank's share of a large model, save it as a checkpoint does, and read it back, bit for bit.

python -m megatron_tn.benchmarking.share model=175b parallel.tp=8 parallel.sequence_parallel=true engine=fsdp2 \
    cluster=h200_141g nodes=64 benchmark.checkpoint=/disk/new benchmark.output=rows.jsonl

Rank 0 of nodes x cluster.gpus_per_node ranks, of which this process alone exists (torch's "fake" process group): its
slice of every parameter, with masters and moments, is made without the whole parameter. The bytes that it writes and
the plan's figure stand side by side, with GB/s. The folder is removed after.
"""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from kernels.bench import rows
from megatron_tn.benchmarking.checkpoint import forget_pages, spent
from megatron_tn.benchmarking.result import layout_of
from megatron_tn.checkpoint.load import fill_owned
from megatron_tn.checkpoint.manifest import CheckpointManifest
from megatron_tn.checkpoint.save import take_snapshot, write_snapshot
from megatron_tn.cli import command, run_program
from megatron_tn.cli.tables import table_console
from megatron_tn.config import BenchmarkConfig, ConfigError, TrainConfig, to_stored
from megatron_tn.device.host_memory import HostMemory
from megatron_tn.engine.build import build_engine, initialize_engine
from megatron_tn.planning.concerns import rank_checkpoint_bytes
from megatron_tn.planning.estimate import GIB
from megatron_tn.planning.live import LiveMemory
from megatron_tn.planning.stand_ins import stand_in_world


@dataclass(frozen=True)
class Share:
    """Bytes. state: masters and moments. written: the file. peak: all tensors, until the masters had values.
    Seconds: initialise, copy, write, read."""

    state: int
    written: int
    peak: int
    initialise: float
    copy: float
    write: float
    read: float


def measure(config: TrainConfig, ranks: int, folder: Path, device: torch.device) -> Share:
    """Rank 0's share of `ranks` ranks.

    Raises:
        RuntimeError: what was read is not what was saved.
    """
    with stand_in_world(config.parallel, 0, ranks) as context:
        with LiveMemory() as memory:
            engine = build_engine(config, context, device)
            initialise = spent(lambda: initialize_engine(engine, config.seed), device).wall
        owned = engine.owned_ranges()
        for each in owned:
            for kind in each.values.keys() - {"param"}:
                each.values[kind].normal_()
        before = [{kind: values.cpu().clone() for kind, values in each.values.items()} for each in owned]
        taken = []
        step = {"step": 1, "optimizer_step": 1, "config": to_stored(config), "training": {"step": 1}}
        host = HostMemory()
        copy = spent(lambda: taken.append(take_snapshot(engine, folder, memory=host, **step)), device).wall
        alone = dataclasses.replace(taken.pop(), world_size=1)  # the other ranks write nothing
        paths = []
        write = spent(lambda: paths.append(write_snapshot(alone)), device).wall
        forget_pages(paths[0])
        read = spent(lambda: fill_owned(engine, paths[0], CheckpointManifest.read(paths[0])), device).wall
        for each, values in zip(owned, before, strict=True):
            for kind, saved in values.items():
                if not torch.equal(each.values[kind].cpu(), saved):
                    raise RuntimeError(f"{kind} of {each.name} was read with other values than it was saved with")
        state = sum(value.nbytes for values in before for value in values.values())
        written = sum(path.stat().st_size for path in paths[0].glob("*.safetensors"))
        return Share(state, written, memory.peak, initialise, copy, write, read)


def benchmark(config: BenchmarkConfig) -> None:
    ranks = config.nodes * max(config.cluster.gpus_per_node, 1)
    problems, folder = config.problems(), config.benchmark.checkpoint
    if config.engine.name == "deepspeed":
        problems.append(f"engine.name={config.engine.name} reads values of other ranks: take engine=fsdp2 or local")
    if not folder or Path(folder).exists():
        problems.append(f"benchmark.checkpoint={folder} must be a new folder")
    if ranks % (config.parallel.tp * config.parallel.cp):
        problems.append(f"nodes={config.nodes} has {ranks} ranks, no multiple of tp x cp")
    if problems:
        raise ConfigError(problems)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = measure(config, ranks, Path(folder), device)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    values = {
        "checkpoint, the plan's": ("GB", rank_checkpoint_bytes(config, ranks) / 1e9),
        "checkpoint, written": ("GB", found.written / 1e9),
        "state": ("GiB", found.state / GIB),
        "peak until it has values": ("GiB", found.peak / GIB),
        "initialise": ("s", found.initialise),
        "copy to the host": ("s", found.copy),
        "write": ("GB/s", found.written / found.write / 1e9),
        "read, cold": ("GB/s", found.written / found.read / 1e9),
    }
    table = Table(f"rank 0 of {ranks}", "", "")
    for name, (unit, value) in values.items():
        table.add_row(name, f"{value:.2f}", unit)
    console = table_console()
    console.print(table)
    console.print("read back bit for bit")
    if config.benchmark.output:
        same = {"model": config.model.name, **layout_of(config, ranks)}
        written = [rows.row(f"share: {name}", unit, value, **same) for name, (unit, value) in values.items()]
        rows.append(Path(config.benchmark.output), written)


main = command(BenchmarkConfig, "benchmark")(benchmark)

if __name__ == "__main__":
    run_program(main)
