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

from megatron_tn.device.allocator import use_expandable_segments
from megatron_tn.parallel.world import leave_world

TIMEOUT_S = 300


def run_ranks(size: int, function: Callable[..., Any], *args: Any, device: str = "cpu") -> list[Any]:
    """[function(*args) on rank 0, on rank 1, ...]; the default group is initialised. `function` must be importable.

    device "cuda" gives each rank a GPU and NCCL; `this_device()` says which. A failure in any rank fails the test with
    that rank's traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.set_forkserver_preload(["tests.helpers.preload"])
        # A process that has looked at CUDA cannot be forked.
        method = "spawn" if torch.cuda.is_available() else "forkserver"
        mp.start_processes(_rank, (size, folder, device, function, args), nprocs=size, start_method=method)
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(size)]


def this_device() -> torch.device:
    """The device of this rank, or of this process where there are no ranks."""
    return torch.device(_device)


_device = "cpu"


def _rank(rank: int, size: int, folder: str, device: str, function: Callable[..., Any], args: tuple) -> None:
    global _device
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    if device == "cuda":
        _device = f"cuda:{rank}"
        torch.cuda.set_device(rank)
        use_expandable_segments()
    # A file store needs no port, so tests can run side by side.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
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
        leave_world()
