"""Stop signals: a signal to any one rank makes all ranks save at the same step and exit."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

SAME_S = 1.0  # seconds; closer SIGINTs are one Ctrl-C, sent by the terminal and forwarded by torchrun
INTERRUPTED = 128 + signal.SIGINT  # exit code, a shell's code for Ctrl-C
HELD = (signal.SIGTERM, signal.SIGUSR1)


def hold_signals() -> None:
    """Block SIGTERM and SIGUSR1, which end a process by default, until a `Preemption` takes them: for the time of
    imports and preflight. Threads and programs that are started meanwhile inherit the mask."""
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD)


class Preemption:
    """Records SIGTERM, SIGUSR1 or SIGINT; the training step's loss reduction also carries the stop flag to other ranks.

    A second Ctrl-C ends the process at once, by a thread: Python runs signal handlers in the main thread, which may be
    blocked in a collective. A process started with SIGINT ignored keeps ignoring it: shells start background jobs so,
    and launch/node.sh its trainers.

    stopped: set by a training loop that stops because of the signal. A handler of SIGUSR1 that was there before, such
    as submitit's, which requeues its job, is then called on exit.

    received: the first signal's name, or None. joined: whether the ranks have joined; before, Ctrl-C ends the process
    at once: there is nothing to save, and a rank would wait for those that Ctrl-C ended while they imported.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self, joined: bool = True) -> None:
        self.joined = joined
        self.received: str | None = None
        self.stopped = False
        self._before: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        """The exit code of a process that saved and stopped because of the signal."""
        return INTERRUPTED if self.received == "SIGINT" else 0

    def __enter__(self) -> Preemption:
        for number in self.SIGNALS:
            if number != signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._remember)
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        self._mask_before = signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:  # what comes between two jobs of a sweep is for the next one
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask_before)
        for number, handler in self._before.items():
            # Repeated signals during the exit must not change the exit code.
            signal.signal(number, signal.SIG_IGN if self.received else handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._writer)  # the thread reads end of file and ends
        earlier = self._before[signal.SIGUSR1]
        if self.stopped and kind is None and self.received == "SIGUSR1" and callable(earlier):
            earlier(signal.SIGUSR1, None)

    def _remember(self, number: int, _frame) -> None:
        self.received = self.received or signal.Signals(number).name

    def _listen(self) -> None:
        first = None
        while numbers := os.read(self._reader, 64):
            if signal.SIGINT not in numbers or signal.SIGINT not in self._before:
                continue
            if not self.joined:
                if os.environ.get("RANK", "0") == "0":
                    os.write(2, b"interrupted before there was anything to save\n")
                os._exit(INTERRUPTED)
            first = first or time.monotonic()
            if time.monotonic() - first > SAME_S:
                os.write(2, b"interrupted again: ended without saving\n")
                os._exit(INTERRUPTED)
        os.close(self._reader)
