"""Being told to stop: a signal to any one rank makes all ranks save the same step and leave."""

from __future__ import annotations

import os
import signal
import threading
import time

SAME_S = 1.0  # SIGINTs within so many seconds are one Ctrl-C: the terminal sends it to all, and torchrun passes it on
INTERRUPTED = 128 + signal.SIGINT  # exit code, as shells have it for a program that Ctrl-C ended


class Preemption:
    """Remembers SIGTERM, SIGUSR1 or SIGINT; the training step tells the other ranks, in the reduction it does anyway.

    A second Ctrl-C ends the process at once. A thread listens for it, since Python runs handlers in the main thread,
    which may be waiting inside a collective. SIGINT stays ignored in a process that was started so, as shells start
    background jobs and launch/node.sh starts its trainers.

    received: the signal's name, None until one came.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, object] = {}

    @property
    def exit_code(self) -> int:
        """Of a process that saved and stopped because of the signal."""
        return INTERRUPTED if self.received == "SIGINT" else 0

    def __enter__(self) -> Preemption:
        for number in self.SIGNALS:
            if number != signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._remember)
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            # Whoever told this process to stop may say so again, while it ends: that must not change its exit code.
            signal.signal(number, signal.SIG_IGN if self.received else handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._writer)  # the thread reads the end of the pipe

    def _remember(self, number: int, _frame) -> None:
        self.received = self.received or signal.Signals(number).name

    def _listen(self) -> None:
        first = None
        while numbers := os.read(self._reader, 64):
            if signal.SIGINT not in numbers or signal.SIGINT not in self._before:
                continue
            first = first or time.monotonic()
            if time.monotonic() - first > SAME_S:
                os.write(2, b"interrupted again: ended without saving\n")
                os._exit(INTERRUPTED)
        os.close(self._reader)
