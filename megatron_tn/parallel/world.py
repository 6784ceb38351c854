"""Process group initialisation under torchrun, the deepspeed launcher, srun, or for a single process."""

import contextlib
import datetime
import gc
import itertools
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megatron_tn.config import ConfigError
from megatron_tn.device.allocator import use_expandable_segments

T = TypeVar("T")
PARTING_S = 10  # how long rank 0 waits for the others to receive an error

_worlds = itertools.count()  # numbers the process group initialisations of this process
_readings = itertools.count()  # numbers its calls of `of_first`
_meetings: dict[tuple, tuple[dist.Store, int, int]] = {}  # address -> the launcher's store, this rank, number of ranks


def number(*names: str, default: int, least: int = 0) -> int:
    """The first of these environment variables that is set, or `default`. Raises ConfigError unless it is a number."""
    name = next((name for name in names if os.environ.get(name)), None)
    if name is None:
        return default
    text = os.environ[name]
    if not (text.isascii() and text.isdigit() and len(text) < 19 and int(text) >= least):
        raise ConfigError(f"{name}={text!r} in the environment must be a number of at least {least}")
    return int(text)


def world_size() -> int:
    """Number of processes the launcher started; needs no process group."""
    return number("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", default=1, least=1)


def processes_here() -> int:
    """Number of those on this machine."""
    return number("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE", default=0, least=1) or world_size()


def device_here() -> torch.device:
    """The GPU of this process's LOCAL_RANK, or the CPU; needs no process group."""
    local_rank = number("LOCAL_RANK", default=0)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def join_world(timeout_s: int) -> torch.device:
    """Initialise the default process group and return this process's device.

    torchrun and deepspeed set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Under plain srun these are set
    from SLURM's variables. Without a launcher the world size is 1. Backends: NCCL for CUDA tensors, gloo for CPU, which
    connects two ranks when they first send to each other, unless TORCH_GLOO_LAZY_INIT=0 is set: else each of n ranks
    holds n - 1 sockets of every group.
    """
    _translate_slurm()
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    gc.collect()  # in a sweep, frees the last job's engine, which has reference cycles
    os.environ.setdefault("LOCAL_RANK", "0")  # deepspeed requires the variable
    for name in ("RANK", "MASTER_PORT"):
        number(name, default=0)
    device, backend = device_here(), "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        use_expandable_segments()
        torch.cuda.empty_cache()
        backend = "cpu:gloo,cuda:nccl"
    timeout = datetime.timedelta(seconds=timeout_s)
    if "RANK" in os.environ:
        with _joining(timeout_s):
            store, rank, size = _meet(timeout_s)
            # In a sweep the store still holds the keys of the last job's process groups, so each initialisation gets
            # its own prefix; the count is the same on all ranks.
            store = dist.PrefixStore(f"megatron_tn/{next(_worlds)}", store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return device


def of_first(read: Callable[[], T], timeout_s: int) -> T:
    """What `read()` returns, or raises, on rank 0, on every rank: one process reads a file that all need. It needs no
    process group: rank 0 puts the value into the launcher's store. Where pickle cannot carry it, each rank reads.
    Collective.

    Raises:
        ConfigError, RuntimeError: rank 0 could not be reached, as in `join_world`.
    """
    _translate_slurm()
    if "RANK" not in os.environ or world_size() == 1:
        return read()
    with _joining(timeout_s):
        store, rank, size = _meet(timeout_s)
    store = dist.PrefixStore(f"megatron_tn/of_first/{next(_readings)}", store)
    if rank > 0:
        with _joining(timeout_s):
            found = store.get("value")
            store.add("received", 1)
        return _received(found, read)
    value, error = _outcome(read)
    store.set("value", _pickled((value, error)))
    if error is not None:  # this process ends, and with it a store of its own
        _wait_until(lambda: store.add("received", 0) == size - 1, PARTING_S)
        raise error
    return value


def first_for_all(act: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """What `act()` returns, or raises, on rank 0 of `group` (None: of all ranks), on every rank of it. It may write: no
    other rank ever runs it. Pickle must carry what it returns; an exception that pickle cannot carry is a RuntimeError
    on the other ranks. Collective over `group`."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return act()
    value, error = _outcome(act) if dist.get_rank(group) == 0 else (None, None)
    sent = [value, _carried(error)]
    dist.broadcast_object_list(sent, src=0 if group is None else dist.get_global_rank(group, 0), group=group)
    if error := error or sent[1]:
        raise error
    return sent[0]


def of_all(value: T) -> list[T]:
    """Every rank's value, in rank order, on every rank; without process groups `value` alone. Pickle must carry it.
    Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    found: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def anywhere(here: bool) -> bool:
    """Whether `here` is True on any rank. Collective, on the CPU, without a wait for the GPU."""
    flag = torch.tensor(int(here))
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def _carried(error: Exception | None) -> Exception | None:
    """`error`, or its text where pickle cannot carry it."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:  # a constructor that takes more than a message
        return RuntimeError(f"rank 0: {type(error).__name__}: {error}")


def _outcome(read: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return read(), None
    except Exception as error:
        return None, error


def _received(found: bytes, read: Callable[[], T]) -> T:
    """What rank 0 sent."""
    try:
        value, error = pickle.loads(found)
    except Exception:  # nothing, or an exception whose constructor takes more than its message
        return read()
    if error is not None:
        raise error
    return value


def _pickled(value: object) -> bytes:
    """The value pickled; empty for one that cannot be pickled, of a caller's own class."""
    try:
        return pickle.dumps(value)
    except Exception:
        return b""


def _wait_until(true: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.05)


def _meet(timeout_s: int) -> tuple[dist.Store, int, int]:
    """The launcher's store, this process's rank and the number of ranks. Kept, since rank 0 itself may serve it."""
    timeout = datetime.timedelta(seconds=timeout_s)
    address = tuple(os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"))
    if address not in _meetings:
        _meetings[address] = next(rendezvous("env://", timeout=timeout))
    _meetings[address][0].set_timeout(timeout)
    return _meetings[address]


@contextlib.contextmanager
def _joining(timeout_s: int) -> Iterator[None]:
    """Says in one line what kept this rank from joining the others."""
    try:
        yield
    except RuntimeError as error:
        port = os.environ.get("MASTER_PORT")
        if "EADDRINUSE" in str(error):
            raise ConfigError(
                f"MASTER_PORT={port} is in use on this host: name a free port, or start with launch/local.sh, which "
                "finds one"
            ) from None
        raise RuntimeError(
            f"rank {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} could not join the others at "
            f"{os.environ.get('MASTER_ADDR')}:{port} within distributed_timeout_s={timeout_s}: "
            f"{str(error).splitlines()[0]}"
        ) from error


class Holder(Protocol):
    """An object to release before its process groups are destroyed: CUDA graphs with collectives (NCCL waits for them
    before it frees a communicator); an engine whose memory the next job of a sweep needs."""

    def release(self) -> None: ...


_holders: list[Holder] = []


def release_on_leaving(holder: Holder) -> None:
    """Call `holder.release()` in `release_holders`, before the process groups are destroyed."""
    _holders.append(holder)


def release_holders() -> None:
    while _holders:
        _holders.pop().release()  # in reverse order: CUDA graphs before the engine that owns their tensors


def leave_world() -> None:
    """Release holders and destroy the process groups. Collective, but for a rank that leaves because of an exception:
    it keeps NCCL's groups, and its process must end next. To free a communicator NCCL waits for the other ranks of the
    machine, and those wait for the failed rank in a collective, until its process has ended.
    """
    failed = sys.exc_info()[0] is not None
    if failed and dist.is_initialized() and dist.get_world_size() > 1 and "nccl" in dist.get_backend_config():
        return
    release_holders()
    if dist.is_initialized():
        dist.destroy_process_group()


def _translate_slurm() -> None:
    if "RANK" in os.environ or number("SLURM_STEP_NUM_TASKS", default=1, least=1) == 1:
        return
    hosts = subprocess.run(
        ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]], capture_output=True, text=True, check=True
    ).stdout.split()
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["WORLD_SIZE"] = os.environ["SLURM_STEP_NUM_TASKS"]
    os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
    os.environ.setdefault("MASTER_ADDR", hosts[0])
    # A port that all ranks of a job agree on and that differs between jobs on a node; ephemeral ports begin at 32768.
    os.environ.setdefault("MASTER_PORT", str(20000 + number("SLURM_JOB_ID", default=0) % 10000))
