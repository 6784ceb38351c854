"""Command lines that a program under test starts, run in processes that have imported everything already.

`python -m MODULE WORDS` takes some seconds to import PyTorch; a process forked from the server that `fork_ranks` uses
takes a tenth of one, and runs the same `__main__`.
"""

import math
import multiprocessing
import os
import runpy
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from launch.results import runs

REAL = subprocess.run
# A start reads the exit codes of all children that have ended: of two threads that read one, the second gets 255.
ONE_AT_A_TIME = threading.Lock()


@pytest.fixture
def forked_programs(monkeypatch):
    """Until the test ends, subprocess.run and launch.results.runs fork what would start Python with a module, here and
    in what is forked."""
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(runs, "Popen", Forked)


def run(command: list[str], *, stdout: Any = None, stderr: Any = None, check: bool = False, **more: Any):
    if command[:2] != [sys.executable, "-m"] or more.keys() - {"pass_fds"}:
        return REAL(command, stdout=stdout, stderr=stderr, check=check, **more)
    return subprocess.CompletedProcess(command, Forked(command, stdout, stderr, dict(os.environ)).wait())


class Forked:
    """`python -m MODULE WORDS` in a forked process. stdout, stderr: open files, or None for those of this process."""

    def __init__(self, command: list[str], stdout: Any, stderr: Any, env: Mapping[str, str]):
        self.args = command
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["tests.helpers.preload"])
        names = [None if file is None else file.name for file in (stdout, stderr)]
        self._process = server.Process(target=_program, args=(dict(env), command[2:], *names))
        with ONE_AT_A_TIME:
            self._process.start()

    def wait(self, timeout: float | None = None) -> int:
        until = time.monotonic() + (math.inf if timeout is None else timeout)
        while (code := self._exit_code()) is None:
            if time.monotonic() >= until:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        return code

    def _exit_code(self) -> int | None:
        with ONE_AT_A_TIME:
            return self._process.exitcode


def _program(environment: dict[str, str], words: list[str], stdout: str | None, stderr: str | None) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    for number, name in ((1, stdout), (2, stderr)):
        if name is not None:
            os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), number)
    subprocess.run = run
    sys.argv = list(words)
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)
