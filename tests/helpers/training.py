"""Starting the real command line in tests: in this process for what fails early, in its own ranks for what trains."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_tn.training.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
# A model that trains in seconds; 401 vocabulary entries divide by nothing.
SMALL = (
    "model=demo",
    "model.vocab_size=401",
    "model.embed_dim=32",
    "model.layers=2",
    "model.glu_dim=48",
    "data.sequence_length=32",
    "data.global_batch=4",
    "data.micro_batch=1",
    "data.workers=0",
    "optim.lr=1e-2",
    "schedule.warmup_steps=2",
    "logging=quiet",
)


def call(main: Callable[[], None], *overrides: str) -> int:
    """Run a command line here, with these words after its name; return its exit code."""
    before = sys.argv
    sys.argv = ["program", *overrides]
    try:
        main()
    except SystemExit as stop:
        return stop.code or 0
    finally:
        sys.argv = before
    return 0


def fork_ranks(size: int, function: Callable[..., None], *args: Any) -> list[multiprocessing.Process]:
    """Start `function(*args)` in `size` processes with a launcher's environment. They come from a fork server that has
    imported everything, so a run of a few steps takes a second."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.helpers.preload"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    processes = []
    for rank in range(size):
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(server.Process(target=_forked, args=(environment, function, args)))
        processes[-1].start()
    return processes


def _forked(environment: dict[str, str], function: Callable[..., None], args: tuple) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    function(*args)


def train_forked(size: int, *overrides: str, function: Callable[..., None] | None = None, args: tuple = ()) -> None:
    """Train in `fork_ranks`. function: called with the overrides and args instead of the command line alone."""
    ranks = fork_ranks(size, function or train_here, overrides, *args)
    for rank, process in enumerate(ranks):
        process.join(timeout=300)
        assert process.exitcode == 0, f"rank {rank} ended with {process.exitcode}"


def train_here(overrides: tuple[str, ...]) -> None:
    """The command line in this process, and its exit code."""
    from megatron_tn.train import main

    sys.exit(call(main, *overrides))


def losses(run_dir: Path) -> dict[int, float]:
    """step -> loss; every step must stand in the log once."""
    found = records(run_dir, "loss")
    steps = [record["step"] for record in found]
    assert len(steps) == len(set(steps))
    return {record["step"]: record["loss"] for record in found}


def records(run_dir: Path, key: str) -> list[dict]:
    """The records of log.jsonl that have `key`."""
    return RunFolder(run_dir).records(key)
