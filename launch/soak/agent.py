"""Faults from within a trainer, each started by a real-time signal: what no signal of the kernel does by itself.

Python runs the handlers in the main thread, so a rank that waits in a collective has its fault after it.
"""

import contextlib
import ctypes
import errno
import itertools
import os
import signal
import socket
import sys
import time
from typing import Any

SIGNALS = iter(range(signal.SIGRTMIN + 3, signal.SIGRTMAX))
RAISE, HOLD_LOCK, CUT, READ_ONLY, READ_WRITE, SLOW_SAVE = itertools.islice(SIGNALS, 6)
CUDA_ERROR, OUT_OF_MEMORY = itertools.islice(SIGNALS, 2)
SLOW_S = 600.0
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"}  # audit events
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT

_audited: set[int] = set()  # signals whose fault _audit makes


class InjectedFault(RuntimeError):
    """The exception of one rank."""


def listen() -> None:
    """Wait for the signals in this process."""
    handlers = {
        RAISE: _raise,
        HOLD_LOCK: lambda *_: ctypes.PyDLL(None).sleep(100_000),
        CUT: _cut,
        READ_ONLY: lambda *_: _audited.add(READ_ONLY),
        READ_WRITE: lambda *_: _audited.discard(READ_ONLY),
        SLOW_SAVE: lambda *_: _audited.add(SLOW_SAVE),
        CUDA_ERROR: _fail_in_a_kernel,
        OUT_OF_MEMORY: _take_too_much,
    }
    for number, handler in handlers.items():
        signal.signal(number, handler)
    sys.addaudithook(_audit)


def _raise(*_: Any) -> None:
    raise InjectedFault("a fault of launch.soak")


def _fail_in_a_kernel(*_: Any) -> None:
    """An index beyond a tensor's end on the GPU: a later call of this process finds the CUDA context lost."""
    import torch

    torch.zeros(1, device="cuda")[torch.full((1,), 9, device="cuda")]


def _take_too_much(*_: Any) -> None:
    import torch

    torch.empty(1 << 60, dtype=torch.uint8, device="cuda")  # refused before any memory is mapped


def _cut(*_: Any) -> None:
    """Shut down this process's TCP connections: collectives abort, on this rank and on its peers. Sockets that listen
    stay: without them gloo ends the process with SIGABRT."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(name))) as connection:
                    listens = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                    if connection.family in (socket.AF_INET, socket.AF_INET6) and not listens:
                        connection.shutdown(socket.SHUT_RDWR)


def _audit(event: str, arguments: tuple) -> None:
    """An audit hook. READ_ONLY: no file of run_dir can be opened for writing, made, renamed or removed (of writes to
    files that are open already see faults.read_only). SLOW_SAVE: a file of a checkpoint is opened for writing SLOW_S
    later, so that a save stays unfinished."""
    if not _audited or not (event in CHANGES or (event == "open" and arguments[2] & WRITES)):
        return
    run_dir = next((word.removeprefix("run_dir=") for word in sys.argv if word.startswith("run_dir=")), None)
    path = arguments[0]
    if not run_dir or not isinstance(path, str | bytes | os.PathLike):
        return
    path = os.path.abspath(os.fsdecode(path))
    if not path.startswith(os.path.abspath(run_dir) + os.sep):
        return
    if READ_ONLY in _audited:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
    if SLOW_SAVE in _audited and event == "open" and ".tmp" + os.sep in path:
        time.sleep(SLOW_S)
