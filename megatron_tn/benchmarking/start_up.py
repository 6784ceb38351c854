"""Count the files that a rank opens and reads before its first step, in simulated worlds of many ranks.

python -m megatron_tn.benchmarking.start_up --folder NEW --ranks 8 64 512

The command line of a small model with FSDP2 resumes from a checkpoint of as many ranks, or begins from its weights
(init_from, with optim=muon), up to its first step, as rank 0, an inner rank and the last one in turn, in this process.
torch's "fake" process group stands for the others' tensors; what rank 0 sends as objects is kept and given to the ranks
after it. Beside files below --folder, which a cluster has on a shared disk, stand those of the software, the process
groups that a rank creates, and the bytes of the objects that it receives from others.
"""

import argparse
import contextlib
import dataclasses
import itertools
import math
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from rich.table import Table
from torch.testing._internal.distributed.fake_pg import FakeStore

from data_pipeline.stream.bench import write_shards
from megatron_tn.checkpoint.files import write_tensors
from megatron_tn.checkpoint.manifest import MANIFEST, CheckpointManifest, checkpoint_name, rank_file
from megatron_tn.checkpoint.reshard import pieces_of_local_range
from megatron_tn.cli.override_check import check_overrides
from megatron_tn.cli.overrides import CommandLine, settings
from megatron_tn.cli.tables import table_console
from megatron_tn.config import TrainConfig, from_mapping, to_stored
from megatron_tn.model.registry import build_model
from megatron_tn.parallel.world import leave_world
from megatron_tn.train import main as train
from megatron_tn.training.state import TrainingState

TP = 8
KINDS = ("param", "exp_avg", "exp_avg_sq")
WORDS = (
    *("model=demo", "model.vocab_size=512", "model.embed_dim=64", "model.heads=8", "model.layers=1"),
    *("model.glu_dim=64", f"parallel.tp={TP}", "engine=fsdp2", "engine.compile=none", "logging=quiet"),
    *("data.sequence_length=64", "data.micro_batch=1", "data.workers=0", "cluster.gpu_memory_gib=80"),
)
IMPORTS = """
import sys, time
opened, began = [], time.perf_counter()
sys.addaudithook(lambda event, values: opened.append(values) if event == "open" else None)
import megatron_tn.train
read = int(open("/proc/self/io").read().split()[1])
print(f"{len(opened):,} opens, {read / 1e6:.0f} MB, {time.perf_counter() - began:.1f} s")
"""


@dataclasses.dataclass(frozen=True)
class Count:
    """Counts of one rank's start. shared: opens of files below the folder; manifests: those of a manifest.json among
    them. software: all other opens. read: bytes. groups: process groups created. told: bytes of objects from other
    ranks."""

    ranks: int
    rank: int
    shared: int
    manifests: int
    software: int
    read: int
    groups: int
    told: int
    seconds: float


class _FirstStep(SystemExit):
    """Raised in place of the first step, to end the start there. A SystemExit, which a run does not report as its
    failure."""


class Opens:
    """Paths of files that this process opens while it is on."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.on = False
        sys.addaudithook(self._hear)  # cannot be taken back

    def _hear(self, event: str, values: tuple) -> None:
        if self.on and event == "open" and isinstance(values[0], str | bytes | os.PathLike):
            self.paths.append(os.fsdecode(values[0]))


class Others:
    """What ranks sent each other as objects: broadcasts and scattered values of rank 0, and all values for it."""

    def __init__(self, ranks: int):
        self.ranks = ranks
        self.sent: dict[int, list[Any]] = {}  # rank -> what it sent to rank 0, call by call
        self.received: list[Any] = []  # what rank 0 sent, call by call
        self.store = dist.HashStore()
        self.told = 0  # bytes of objects that this rank has received from others

    @contextlib.contextmanager
    def around(self, rank: int) -> Iterator[None]:
        """Context manager: this process acts as `rank`."""
        calls, mine, self.told = itertools.count(), self.sent.setdefault(rank, []), 0
        mine.clear()
        if rank == 0:
            self.received.clear()

        def broadcast(values: list, src: int = 0, **options: Any) -> None:
            if rank == 0:
                self.received.append(list(values))
            values[:] = self.received[next(calls)]
            hear(values if rank else ())

        def gather(value: Any, values: list | None = None, dst: int = 0, **options: Any) -> None:
            at = len(mine)
            mine.append(value)
            if values is not None:
                values[:] = [value] * self.ranks
                for other, theirs in self.sent.items():
                    values[other] = theirs[at] if at < len(theirs) else value
                hear(values)

        def scatter(output: list, values: list | None, src: int = 0, **options: Any) -> None:
            if rank == 0:
                self.received.append(list(values))
            output[0] = self.received[next(calls)][rank]
            hear(output if rank else ())

        def gather_everywhere(values: list, value: Any, **options: Any) -> None:
            values[:] = [value] * self.ranks
            hear(values)

        def hear(values: Sequence[Any]) -> None:
            self.told += sum(len(pickle.dumps(value)) for value in values)

        def join(timeout_s: int) -> torch.device:
            dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=self.ranks)
            return torch.device("cpu")

        launched = {"RANK": str(rank), "WORLD_SIZE": str(self.ranks), "LOCAL_RANK": str(rank % TP)}
        with contextlib.ExitStack() as stack:
            for name, stand_in in (
                ("torch.distributed.broadcast_object_list", broadcast),
                ("torch.distributed.gather_object", gather),
                ("torch.distributed.scatter_object_list", scatter),
                ("torch.distributed.all_gather_object", gather_everywhere),
                ("megatron_tn.training.run.join_world", join),
                ("megatron_tn.parallel.world._meet", lambda timeout_s: (self.store, rank, self.ranks)),
                ("megatron_tn.parallel.world._readings", itertools.count()),
                ("megatron_tn.train.train_step", _stop),
            ):
                stack.enter_context(mock.patch(name, stand_in))
            stack.enter_context(mock.patch.dict(os.environ, launched))
            yield


def _stop(*arguments: Any, **options: Any) -> None:
    raise _FirstStep


def simulate(folder: Path, ranks: int, opens: Opens, *, first: bool) -> list[Count]:
    """Counts of rank 0, an inner rank and the last one of a start of `ranks` ranks, from a checkpoint of theirs. first:
    a first start, with Muon, from that checkpoint's weights."""
    words = prepare(folder, ranks)
    if first:
        shutil.rmtree(folder / "earlier", ignore_errors=True)
        (folder / "run").rename(folder / "earlier")
        words += [f"init_from={folder / 'earlier'}", "optim=muon"]
    others, simulated = Others(ranks), (0, ranks // 2 + 1, ranks - 1)
    for rank in simulated:  # to learn what each rank asks rank 0 for
        with others.around(rank):
            _started(folder, words, opens, others, rank)
    found = []
    for rank in simulated:
        with others.around(rank):
            count, came_far = _started(folder, words, opens, others, rank)
        if not came_far:
            raise RuntimeError(f"rank {rank} of {ranks} did not come to its first step: {' '.join(words)}")
        found.append(count)
    return found


def _started(folder: Path, words: list[str], opens: Opens, others: Others, rank: int) -> tuple[Count, bool]:
    """Run one rank's start; returns whether it reached its first step."""
    opens.paths, before, argv = [], _bytes_read(), sys.argv
    groups, make, came_far = [], dist.new_group, False

    def new_group(*arguments: Any, **options: Any) -> Any:
        groups.append(arguments)
        options.pop("backend", None)  # gloo would look for the other ranks
        return make(*arguments, **options)

    def count() -> Count:
        inside = [path for path in opens.paths if Path(path).is_relative_to(folder)]
        manifests = sum(Path(path).name == MANIFEST for path in inside)
        software, seconds = len(opens.paths) - len(inside), time.perf_counter() - began
        read, told = _bytes_read() - before, others.told
        return Count(others.ranks, rank, len(inside), manifests, software, read, len(groups), told, seconds)

    sys.argv, began = ["train", *words], time.perf_counter()
    opens.on = True
    try:
        with mock.patch("torch.distributed.new_group", new_group):
            train()
    except SystemExit as stop:
        came_far = isinstance(stop, _FirstStep)
    finally:
        opens.on, sys.argv = False, argv
        counted = count()
        leave_world()
    return counted, came_far


def _bytes_read() -> int:
    """Bytes that this process has read so far, from files, sockets and pipes."""
    return int(Path("/proc/self/io").read_text().split()[1])


def prepare(folder: Path, ranks: int) -> list[str]:
    """Shards, and a run with a checkpoint of FSDP2's layout over `ranks` ranks. The words of the run's command line."""
    if not (folder / "shards").exists():
        (folder / "shards").mkdir(parents=True)
        write_shards(folder / "shards", shards=1, shard_tokens=40_000, vocab_size=512)
    shutil.rmtree(folder / "run", ignore_errors=True)
    words = [*WORDS, f"data.manifest={folder / 'shards' / MANIFEST}", f"run_dir={folder / 'run'}"]
    words += [f"data.global_batch={ranks // TP}", "optim.lr=1e-3"]
    line = CommandLine.parse(TrainConfig, "config", words)
    check_overrides(line)
    config = from_mapping(TrainConfig, settings(line.composed))
    checkpoint = folder / "run" / "checkpoints" / checkpoint_name(4)
    checkpoint.mkdir(parents=True)
    (checkpoint / MANIFEST).write_text(_write_files(checkpoint, config, ranks).to_json())
    return words


def _write_files(checkpoint: Path, config: TrainConfig, ranks: int) -> CheckpointManifest:
    specs = build_model(config.model, None, "meta", torch.float32).shard_specs()
    dp = ranks // TP
    manifest = CheckpointManifest(
        4,
        4,
        to_stored(config),
        {"dp": dp, "cp": 1, "tp": TP},
        {name: list(spec.shape) for name, spec in specs.items()},
        training=TrainingState(step=4).to_json() | {"stream": {}},
        padded_vocab=specs["model.embed_tokens.weight"].padded,
    )
    for rank in range(ranks):
        file, tensors = rank_file(rank), {}
        for name, spec in specs.items():
            if spec.replicated and rank % TP:
                continue
            rows, *rest = spec.local_shape(rank % TP, TP)
            width, share = math.prod(rest), -(-rows // dp)
            start, stop = (min(edge * share, rows) * width for edge in (rank // TP, rank // TP + 1))
            for kind in KINDS:
                here = manifest.pieces.setdefault(f"{kind}/{name}", [])
                for piece, _ in pieces_of_local_range(spec, rank % TP, TP, start, stop):
                    key = f"{kind}/{name}/{len(tensors)}"
                    tensors[key] = torch.zeros(piece.stop - piece.start)
                    here.append(dataclasses.replace(piece, file=file, key=key))
        manifest.files[file] = write_tensors(checkpoint / file, tensors)
    return manifest


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m megatron_tn.benchmarking.start_up", description=__doc__)
    parser.add_argument("--folder", type=Path, default=None, help="new folder to work in; removed after")
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="*",
        default=[8, 64, 512],
        help="world sizes to simulate, multiples of 8 (default: 8 64 512)",
    )
    asked = parser.parse_args()
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="start_up_"))
    names = "ranks", "start", "rank", "opens", "of a manifest", "of software", "MB read", "MB told", "groups", "s"
    opens, table = Opens(), Table(*names)
    try:
        for ranks, first in itertools.product(asked.ranks, (False, True)):
            for each in simulate(folder.absolute(), ranks, opens, first=first):
                cells = each.rank, each.shared, each.manifests, each.software, f"{each.read / 1e6:.2f}"
                start = "init_from, Muon" if first else "resume"
                rest = f"{each.told / 1e6:.3f}", each.groups, f"{each.seconds:.2f}"
                table.add_row(str(each.ranks), start, *map(str, cells + rest))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    console = table_console()
    console.print(table)
    said = subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True, text=True).stdout.strip()
    console.print(f"before that, importing the software, equal for each rank: {said}", soft_wrap=True)


if __name__ == "__main__":
    main()
