"""The watchdog of a rank: writes the rank's sign of life, detects a hang, and ends the process."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from functools import partial
from pathlib import Path

import torch.distributed as dist

from megatron_tn.config import open_new
from megatron_tn.parallel.world import first_for_all
from megatron_tn.training.run_folder import RunFolder
from megatron_tn.training.watchdog.detect import from_collective, patience_s
from megatron_tn.training.watchdog.observe import Observer
from megatron_tn.training.watchdog.signs import MOST_INTERVAL_S, Progress, Sign, new_folder
from megatron_tn.training.watchdog.stack import where_this_process_is

HANG_EXIT = 75  # exit code after a hang
REPORT_S = 30.0  # for stacks, signs and messages on a busy disk, beyond timeout_s; then faulthandler ends the process


class Watchdog:
    """A context manager for every rank. The constructor is collective; entry and exit are not.

    timeout_s: limit of one phase of a step; 0 turns the watchdog off. long_s: limit of long phases: start, the first
    step (which compiles), evaluation, a save that waits for the previous one, stop.
    """

    def __init__(self, run: RunFolder, progress: Progress, *, timeout_s: float, long_s: float):
        folder = first_for_all(partial(new_folder, run))  # one folder per start, without signs of earlier starts
        self.run = run
        self.progress = progress
        self.timeout_s = timeout_s
        self.long_s = long_s
        self.interval_s = min(MOST_INTERVAL_S, timeout_s / 6)
        self.size = dist.get_world_size()
        self.observer = Observer(folder, self.size, self.interval_s, self._write)
        self._me = Sign(dist.get_rank(), socket.gethostname(), os.getpid())
        self._count = 0
        self._failure, self._lost = "", False
        self._done = threading.Event()
        self._told = False  # whether another rank has reported the hang
        targets = (self._live, self._watch)
        self._threads = [threading.Thread(target=target, name="watchdog", daemon=True) for target in targets]

    def __enter__(self) -> Watchdog:
        faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)  # kill -USR2 PID prints its stacks
        if self.timeout_s:
            self._write()
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(2 * self.interval_s)
        faulthandler.cancel_dump_traceback_later()

    @property
    def folder(self) -> Path:
        """The folder of this start's signs of life."""
        return self.observer.folder

    def explain(self, error: BaseException) -> str:
        """Message about the rank that failed first or died, if it caused this rank's `error`; "" when unknown.

        Takes a few seconds when `error` is a collective's.
        """
        self._lost = from_collective(error)  # set first: the heartbeat thread reads it
        self.progress.at(self.progress.phase)  # restarts the phase's timeout
        first_line = next(iter(str(error).strip().splitlines()), "")
        self._failure = f"{type(error).__name__}: {first_line}"
        self._write()
        if not self.timeout_s or self.size == 1 or not self._lost:
            return ""
        return self.observer.failure(self._mark_failed)

    def is_first_to_fail(self) -> bool:
        """Whether no other rank of this start has asked before. Where nothing can be written, true of rank 0."""
        try:
            os.close(os.open(self.folder / "failed", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            return False
        except OSError:
            return self._me.rank == 0
        return True

    def _live(self) -> None:
        """Write signs of life, in a separate thread, so that a hanging file system does not block the run."""
        while not self._done.wait(self.interval_s):
            self._write()
            self._told = self.observer.hang_file.exists()

    def _watch(self) -> None:
        while True:
            self._arm()
            if self._done.wait(self.interval_s):
                return
            if self._told or time.monotonic() - self.progress.since > self._limit_s:
                self._give_up()

    def _arm(self, more_s: float = 0.0) -> None:
        """Reset the timer of faulthandler's C thread, which ends the process with exit code 1 if C code holds the GIL,
        or a file system hangs, and blocks this thread."""
        faulthandler.dump_traceback_later(self.timeout_s + self.interval_s + more_s, exit=True, file=2)

    @property
    def _limit_s(self) -> float:
        progress = self.progress
        return patience_s(
            progress.phase,
            first_step=progress.step == progress.first_step,
            failed=bool(self._failure),
            timeout_s=self.timeout_s,
            long_s=self.long_s,
        )

    def _give_up(self) -> None:
        """One rank reports the hang; every rank dumps its stacks and exits."""
        self._arm(REPORT_S)
        with contextlib.suppress(OSError):
            self.run.stacks.mkdir(exist_ok=True)
            with open_new(self.run.stacks / f"rank_{self._me.rank:05d}.txt") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        times = {"limit_s": self._limit_s, "timeout_s": self.timeout_s}
        text, first = self.observer.hang(**times, stacks=str(self.run.stacks))
        if first:
            print(text, file=sys.stderr, flush=True)
            self._mark_failed(text.splitlines()[0])
            with contextlib.suppress(OSError), open_new(self.run.hang) as file:
                file.write(text)
        time.sleep(2 * self.interval_s)  # the launcher kills the other ranks when one exits
        os._exit(HANG_EXIT)

    def _write(self) -> None:
        self._count += 1
        try:
            waiting, place = where_this_process_is()
        except Exception as error:  # inspecting running threads may fail; the heartbeat must continue
            waiting, place = False, f"unknown source line: {error!r}"
        me, progress = self._me, self.progress
        where = (self._count, progress.step, progress.phase, place, waiting, self._failure, self._lost)
        Sign(me.rank, me.host, me.pid, *where).write(self.folder)

    def _mark_failed(self, error: str) -> None:
        """Write state "failed" to status.json in place of rank 0, which hangs or has died."""
        with contextlib.suppress(OSError):
            self.run.mark_failed(max(self.progress.step - 1, 0), error)
