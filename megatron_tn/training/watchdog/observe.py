"""Comparing the signs of all ranks: one rank does it, the first that comes, and the others read what it found."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from megatron_tn.training.watchdog.detect import Observation
from megatron_tn.training.watchdog.explain import explain_failure, explain_hang
from megatron_tn.training.watchdog.signs import read_all

SIGNS_TO_WAIT = 3  # intervals between two looks at the signs of all ranks


class Observer:
    """folder: of the signs of one start. size: of the world. interval_s: between two signs of a rank. live: writes this
    rank's own sign, while it waits for those of the others."""

    def __init__(self, folder: Path, size: int, interval_s: float, live: Callable[[], None]):
        self.folder = folder
        self.size = size
        self.interval_s = interval_s
        self.live = live
        self.hang_file = folder / "hang.txt"
        self.failure_file = folder / "failure.txt"

    def hang(self, *, limit_s: float, timeout_s: float, stacks: str) -> tuple[str, bool]:
        """(What there is to say of a hang, whether this rank found it out)."""

        def explain(seen: Observation) -> str:
            return explain_hang(seen, limit_s=limit_s, timeout_s=timeout_s, stacks=stacks)

        return self._once(self.hang_file, explain)

    def failure(self, mark_failed: Callable[[str], None]) -> str:
        """Whose end broke this rank's collective. mark_failed: called on one rank where rank 0 cannot say it."""

        def explain(seen: Observation) -> str:
            text = explain_failure(seen)
            if not seen.rank_0_can_write:
                mark_failed(text)
            return text

        text, _ = self._once(self.failure_file, explain)
        return text or "the rank that compared the others' signs of life ended before it was done"

    def _once(self, file: Path, explain: Callable[[Observation], str]) -> tuple[str, bool]:
        """The text in `file`, which the first rank that comes here writes."""
        try:
            os.close(os.open(file.with_suffix(".begun"), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            return self._wait_for(file), False
        except OSError:
            pass  # where nothing can be written, each rank looks for itself
        text = explain(self._observe())
        with contextlib.suppress(OSError):
            partial = file.with_suffix(".tmp")
            partial.write_text(text)
            partial.rename(file)
        return text, True

    def _observe(self) -> Observation:
        before = read_all(self.folder, self.size)
        self._pass(SIGNS_TO_WAIT)
        return Observation(before, read_all(self.folder, self.size), self.size)

    def _wait_for(self, file: Path) -> str:
        """Its text; empty when the rank that was to write it takes too long."""
        for _ in range(SIGNS_TO_WAIT + 1):
            if file.exists():
                break
            self._pass(1)
        with contextlib.suppress(FileNotFoundError):
            return file.read_text()
        return ""

    def _pass(self, intervals: int) -> None:
        for _ in range(intervals):
            time.sleep(self.interval_s)
            self.live()
