"""Run a function in several gloo processes and get each one's result."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_S = 300


def run_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """[function(*args) on rank 0, on rank 1, ...]; the default group is initialised. `function` must be importable.

    A failure in any rank fails the test with that rank's traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.set_forkserver_preload(["tests.helpers.preload"])
        mp.start_processes(_rank, (size, folder, function, args), nprocs=size, start_method="forkserver")
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(size)]


def _rank(rank: int, size: int, folder: str, function: Callable[..., Any], args: tuple) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    # A file store needs no port, so tests can run side by side.
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=TIMEOUT_S),
    )
    try:
        torch.save(function(*args), f"{folder}/{rank}.pt")
        dist.barrier()
    except Exception:
        traceback.print_exc()
        raise
    finally:
        dist.destroy_process_group()
