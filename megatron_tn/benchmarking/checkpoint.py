"""Measure checkpoints on this machine: the pause of a save, GB/s of writing, loading and verifying, and a resume.

python -m megatron_tn.benchmarking.checkpoint --folder /disk/bench --models 1b 3b 7b/8 --resume 1b --output rows.jsonl

A model's masters and moments lie on the GPU if there is one; 7b/8 is one rank's eighth of them. Files are read with a
cold page cache. Beside them stand the rates of `dd` with direct I/O in the same folder. --resume: seconds from the
start of `python -m megatron_tn.train` to the first step (start-up) and to its end, from a checkpoint and from initial
values; words after `--` are settings of those runs. Rows of the output are JSON, as of megatron_tn.benchmark.
"""

import argparse
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table

from data_pipeline.stream.bench import write_shards
from kernels.bench import rows
from megatron_tn.benchmarking.decode import model_config
from megatron_tn.checkpoint.ahead import ReadAhead
from megatron_tn.checkpoint.background import CheckpointWriter, Save
from megatron_tn.checkpoint.load import load_checkpoint
from megatron_tn.checkpoint.retention import Retention
from megatron_tn.checkpoint.verify import verify
from megatron_tn.cli.tables import table_console
from megatron_tn.config import ModelConfig, TrainConfig, to_stored
from megatron_tn.device.host_memory import HostMemory
from megatron_tn.model.registry import build_model
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.parallel.sharding import OwnedRange
from megatron_tn.training.run_folder import RunFolder

KINDS = ("param", "exp_avg", "exp_avg_sq")
DD_BYTES = 4 << 30  # at most: what `dd` writes and reads


class State:
    """The `Trainable` of a rank that owns the first 1/`share` of every parameter's master and moments."""

    partitioned = False
    state_kinds = KINDS[1:]

    def __init__(self, config: ModelConfig, share: int, device: torch.device):
        self.context = ParallelContext()
        self.model = build_model(config, None, "meta", torch.float32)
        sizes = {name: math.prod(spec.shape) // share for name, spec in self.model.shard_specs().items()}
        block = torch.zeros(len(KINDS) * sum(sizes.values()), device=device)
        parts = iter(block.split([size for size in sizes.values() for _ in KINDS]))
        self._owned = [
            OwnedRange(name, 0, size, {kind: next(parts).normal_() for kind in KINDS}) for name, size in sizes.items()
        ]
        self.bytes = block.numel() * block.element_size()

    def owned_ranges(self) -> list[OwnedRange]:
        return self._owned

    def refresh(self, optimizer_step: int) -> None: ...


class Bench:
    """Prints and keeps rows."""

    def __init__(self, output: Path | None):
        self.output = output
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, unit: str, value: float, **extras: Any) -> float:
        found = rows.row(name, unit, value, **extras)
        self.rows.append(found)
        print(f"{extras['model']:>8} {name}: {value:.3f} {unit}", flush=True)
        if self.output is not None:
            rows.append(self.output, [found])
        return value

    def show(self) -> None:
        table = Table("model", "GB", "what", "value", "unit", "of dd", "CPU s a GB")
        for row in self.rows:
            size, share, cpu = (
                f"{row[key]:.{digits}f}" if key in row else ""
                for key, digits in (("gigabytes", 1), ("of_dd", 2), ("cpu_s_a_gb", 2))
            )
            table.add_row(row["model"], size, row["name"], f"{row['value']:.3f}", row["unit"], share, cpu)
        table_console().print(table)


def dd_rates(folder: Path, size: int, rounds: int) -> tuple[float, float]:
    """GB/s of `dd` with direct I/O of `size` bytes, writing and reading, medians."""
    file, block = folder / "dd", 16 << 20
    count = max(1, size // block)

    def rate(*words: str) -> float:
        began = time.perf_counter()
        subprocess.run(["dd", "bs=16M", f"count={count}", *words], check=True, capture_output=True)
        return count * block / (time.perf_counter() - began) / 1e9

    try:
        written, read = [], []
        for _ in range(rounds):
            written.append(rate("if=/dev/zero", f"of={file}", "oflag=direct", "conv=fsync"))
            read.append(rate(f"if={file}", "of=/dev/null", "iflag=direct"))
    finally:
        file.unlink(missing_ok=True)
    return statistics.median(written), statistics.median(read)


def forget_pages(checkpoint: Path) -> None:
    """Drop the checkpoint's files from the page cache."""
    for path in checkpoint.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


class Spent(NamedTuple):
    """Seconds of a call, and of all cores of this process in it."""

    wall: float
    cpu: float


def spent(function: Callable[[], Any], device: torch.device) -> Spent:
    began, cpu = time.perf_counter(), time.process_time()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return Spent(time.perf_counter() - began, time.process_time() - cpu)


def measure_files(bench: Bench, folder: Path, name: str, device: torch.device, rounds: int) -> None:
    model, _, share = name.partition("/")
    state = State(model_config(model), int(share or 1), device)
    gigabytes = state.bytes / 1e9
    about = {"model": name, "gigabytes": gigabytes, "pieces": len(KINDS) * len(state.owned_ranges())}
    dd = dd_rates(folder, min(DD_BYTES, state.bytes), max(rounds, 2))
    bench.add("dd, direct write", "GB/s", dd[0], **about)
    bench.add("dd, direct read", "GB/s", dd[1], **about)
    config = to_stored(TrainConfig(model=state.model.config))
    writer = CheckpointWriter(folder, Retention(), background=True, timeout_s=600)
    writer.prepare(state)
    bench.add("host memory, beside training", "s", spent(writer.join, device).wall, **about)
    saves: list[Save] = []

    def save() -> None:
        step = len(saves) + 1
        writer.save(state, step, optimizer_step=step, config=config, training={"step": step})
        saves.append(writer.wait())
        if saves[-1].error is not None:
            raise saves[-1].error

    cpu = []
    for _ in range(1 + rounds):
        if saves:
            shutil.rmtree(saves[-1].path)  # the disk need not hold two
        cpu.append(spent(save, device).cpu)
    writer.close()
    bench.add("pause, first save", "s", saves[0].pause_s, **about)
    bench.add("pause, later saves", "s", statistics.median(save.pause_s for save in saves[1:]), **about)
    checkpoint, loads, checks, resumes = saves[-1].path, [], [], []
    for _ in range(rounds):
        forget_pages(checkpoint)
        loads.append(spent(lambda: load_checkpoint(state, checkpoint), device))
        forget_pages(checkpoint)
        checks.append(spent(lambda: _verify(checkpoint), device))
        forget_pages(checkpoint)
        resumes.append(spent(lambda: _check_and_load(state, checkpoint, device), device))
    writes = [Spent(save.write_s, cpu_s) for save, cpu_s in zip(saves, cpu, strict=True)]
    for what, times, rate in (
        ("write", writes, dd[0]),
        ("load, cold", loads, dd[1]),
        ("verify, cold", checks, dd[1]),
        ("verify and load in one read, cold", resumes, dd[1]),
    ):
        found = gigabytes / statistics.median(time.wall for time in times)
        cpu_s = statistics.median(time.cpu for time in times) / gigabytes
        bench.add(what, "GB/s", found, of_dd=found / rate, cpu_s_a_gb=cpu_s, **about)
    shutil.rmtree(checkpoint)


def _check_and_load(state: State, checkpoint: Path, device: torch.device) -> None:
    """As a resume does, without a model that is built meanwhile."""
    memory = HostMemory()
    ahead = ReadAhead(0, 1, memory, verify=True, pinned=device.type == "cuda")
    if damage := ahead.problems(checkpoint):
        raise RuntimeError("; ".join(damage))
    with ahead.contents(checkpoint) as contents:
        load_checkpoint(state, checkpoint, contents)
    memory.release()


def _verify(checkpoint: Path) -> None:
    # A share lacks the rest of the model.
    if damaged := [problem for problem in verify(checkpoint) if " are in none of the files" not in problem]:
        raise RuntimeError("; ".join(damaged))


def measure_resume(bench: Bench, folder: Path, model: str, settings: list[str]) -> None:
    """The first run fills the compilers' caches and saves; then one starts afresh, and one from the checkpoint."""
    config = model_config(model)
    (folder / "shards").mkdir(parents=True)
    write_shards(folder / "shards", shards=4, shard_tokens=500_000, vocab_size=config.vocab_size)
    words = [f"model={model}", f"data.manifest={folder / 'shards' / 'manifest.json'}", "logging=quiet", *settings]
    begun = folder / "begun"
    for run, more in (
        (begun, ["stop_after=2"]),
        (folder / "fresh", ["stop_after=1", "checkpoint.at_end=false"]),
        (begun, ["stop_after=3", "checkpoint.at_end=false"]),
    ):
        for checkpoint in run.glob("checkpoints/step_*"):
            forget_pages(checkpoint)
        began = time.time()
        command = [sys.executable, "-m", "megatron_tn.train", *words, f"run_dir={run}", "checkpoint.every=0", *more]
        if subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode:
            sys.exit(f"--resume: {' '.join(command[1:])} failed")
        now = [record for record in RunFolder(run).records("time") if record["time"] > began]
        ready = next(record["time"] for record in now if "start/began" in record)
        first = next(record for record in now if "loss" in record)
        if run == begun and first["step"] == 1:
            continue
        source = "initial values" if first["step"] == 1 else "the checkpoint"
        bench.add(f"start-up, from {source}", "s", ready - began, model=model)
        bench.add(f"start to first step, from {source}", "s", first["time"] - began, model=model)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m megatron_tn.benchmarking.checkpoint", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="new folder on the disk to measure; removed after")
    parser.add_argument(
        "--models",
        nargs="*",
        default=["1b"],
        help="files of conf/model, or MODEL/N for one Nth of the model (default: 1b)",
    )
    parser.add_argument("--resume", default="", help="model with which a resume is timed too (default: none)")
    parser.add_argument("--rounds", type=int, default=1, help="loads to time, and saves after the first (default: 1)")
    parser.add_argument("--output", type=Path, help="file that JSON rows are appended to (default: none)")
    words = sys.argv[1:]
    settings = words[words.index("--") + 1 :] if "--" in words else []
    asked = parser.parse_args(words[: len(words) - len(settings) - ("--" in words)])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(asked.output)
    asked.folder.mkdir(parents=True)
    try:
        for name in asked.models:
            measure_files(bench, asked.folder, name, device, asked.rounds)
        if asked.resume:
            measure_resume(bench, asked.folder / "runs", asked.resume, settings)
    finally:
        shutil.rmtree(asked.folder, ignore_errors=True)
        bench.show()


if __name__ == "__main__":
    main()
