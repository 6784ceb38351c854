"""Run a function in several processes joined by gloo or NCCL, and get each one's result.

`run_ranks` starts processes for one call. `run_shared` has worlds that live as long as the tests: a call costs neither
process starts, nor imports, nor NCCL communicators, nor kernels that an earlier call compiled.
"""

from __future__ import annotations

import atexit
import dataclasses
import datetime
import functools
import gc
import io
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_tn.device.allocator import use_expandable_segments
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.parallel.world import leave_world, release_holders

TIMEOUT_S = 300


def run_ranks(size: int, function: Callable[..., Any], *args: Any, device: str = "cpu") -> list[Any]:
    """[function(*args) on rank 0, on rank 1, ...]; the default group is initialised. `function` must be importable.

    device "cuda" gives each rank a GPU and NCCL; `this_device()` says which. A failure in any rank fails the test with
    that rank's traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _rank, (size, folder, device, function, args), nprocs=size, start_method=_context().get_start_method()
        )
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(size)]


def run_shared(size: int, function: Callable[..., Any], *args: Any, device: str = "cpu") -> list[Any]:
    """`run_ranks` in the world of `size` ranks that all calls share.

    `function` must leave modules as it finds them, and neither measure memory nor leave the world. What engines hold is
    released after it, random numbers begin anew, and torch.compile's graphs are forgotten. After a failure, which fails
    the test with the rank's traceback, the next call starts another world.
    """
    world = _worlds.get((size, device))
    if world is None:
        world = _worlds[size, device] = _World(size, device)
    try:
        return world.run(function, args)
    except BaseException:
        _worlds.pop((size, device)).kill()
        raise


def layout(tp: int = 1, cp: int = 1, sequence_parallel: bool = False) -> ParallelContext:
    """`ParallelContext.create`, with the groups, and so NCCL's communicators, of an earlier call. Collective."""
    return dataclasses.replace(_groups(tp, cp), sequence_parallel=sequence_parallel)


_groups = functools.cache(ParallelContext.create)


def this_device() -> torch.device:
    """The device of this rank, or of this process where there are no ranks."""
    return torch.device(_device)


_device = "cpu"
_worlds: dict[tuple[int, str], _World] = {}


class _World:
    """Ranks that wait for functions to run."""

    def __init__(self, size: int, device: str):
        self.folder = tempfile.TemporaryDirectory()  # of the file through which the ranks find each other
        context = _context()
        self.ranks, self.pipes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            self.ranks.append(context.Process(target=_serve, args=(there, rank, size, self.folder.name, device)))
            self.ranks[-1].start()
            there.close()  # so that a dead rank's pipe ends
            self.pipes.append(here)

    def run(self, function: Callable[..., Any], args: tuple) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, args))
        found: dict[Connection, Any] = {}
        while missing := [pipe for pipe in self.pipes if pipe not in found]:
            ready = wait(missing, TIMEOUT_S)
            assert ready, f"ranks {[self.pipes.index(pipe) for pipe in missing]} gave no result in {TIMEOUT_S} s"
            for pipe in ready:
                rank = self.pipes.index(pipe)
                try:
                    failure, result = pipe.recv()
                except EOFError:
                    self.ranks[rank].join(10)
                    code = self.ranks[rank].exitcode
                    raise AssertionError(f"rank {rank} of {len(self.pipes)} died: exit code {code}") from None
                assert not failure, f"rank {rank} of {len(self.pipes)}:\n{failure}"
                found[pipe] = torch.load(io.BytesIO(result), weights_only=False)
        return [found[pipe] for pipe in self.pipes]

    def close(self) -> None:
        """End the ranks, which leave the world when their pipe ends."""
        for pipe in self.pipes:
            pipe.close()
        for rank in self.ranks:
            rank.join(10)
        self.kill()

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.join()
        self.folder.cleanup()


@atexit.register  # before multiprocessing's own, registered earlier, which waits for every process
def _close_worlds() -> None:
    while _worlds:
        _worlds.popitem()[1].close()


def _serve(pipe: Connection, rank: int, size: int, folder: str, device: str) -> None:
    _join(rank, size, folder, device)
    gc.freeze()  # what is imported stays: the collections below need not look at it
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            break
        torch.manual_seed(0)
        answer = io.BytesIO()
        try:
            torch.save(function(*args), answer)
            failure = ""
        except Exception:
            failure = traceback.format_exc()
        pipe.send((failure, answer.getvalue()))
        del function, args, answer
        release_holders()
        torch._dynamo.reset()
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    leave_world()


def _rank(rank: int, size: int, folder: str, device: str, function: Callable[..., Any], args: tuple) -> None:
    _join(rank, size, folder, device)
    try:
        torch.save(function(*args), f"{folder}/{rank}.pt")
        dist.barrier()
    except Exception:
        traceback.print_exc()
        raise
    finally:
        leave_world()


def _join(rank: int, size: int, folder: str, device: str) -> None:
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


def _context() -> multiprocessing.context.BaseContext:
    multiprocessing.set_forkserver_preload(["tests.helpers.preload"])
    # A process that has looked at CUDA cannot be forked.
    return mp.get_context("spawn" if torch.cuda.is_available() else "forkserver")
