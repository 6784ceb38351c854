"""Being told to stop: SIGTERM or SIGUSR1 at any one rank makes all ranks save the same step and leave."""

from __future__ import annotations

import signal


class Preemption:
    """Remembers the signal. The training step tells the other ranks, in the reduction it does anyway."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Preemption:
        for number in self.SIGNALS:
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            # Whoever told this process to stop may say so again, while it ends: that must not change its exit code.
            signal.signal(number, signal.SIG_IGN if self.received else handler)

    def _remember(self, number: int, _frame) -> None:
        self.received = signal.Signals(number).name
