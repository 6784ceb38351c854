"""The first rank to notice a hang or failure compares all ranks' signs; the others read its result."""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from megatron_tn.config import replacing
from megatron_tn.training.watchdog.detect import Observation
from megatron_tn.training.watchdog.explain import explain_failure, explain_hang
from megatron_tn.training.watchdog.signs import read_all

SIGNS_TO_WAIT = 3  # heartbeat intervals between the two readings of all ranks' signs


class Observer:
    """folder: signs of this start. size: world size. interval_s: heartbeat interval. live(): writes this rank's own
    sign; called during waits."""

    def __init__(self, folder: Path, size: int, interval_s: float, live: Callable[[], None]):
        self.folder = folder
        self.size = size
        self.interval_s = interval_s
        self.live = live
        self.hang_file = folder / "hang.txt"
        self.failure_file = folder / "failure.txt"

    def hang(self, *, limit_s: float, timeout_s: float, stacks: str) -> tuple[str, bool]:
        """(Message about the hang, whether this rank composed it)."""

        def explain(seen: Observation) -> str:
            return explain_hang(seen, limit_s=limit_s, timeout_s=timeout_s, stacks=stacks)

        return self._once(self.hang_file, explain)

    def failure(self, mark_failed: Callable[[str], None]) -> str:
        """Message about the rank that broke this rank's collective. mark_failed: writes status.json; called on one rank
        if rank 0 cannot."""

        def explain(seen: Observation) -> str:
            text = explain_failure(seen)
            if not seen.rank_0_can_write:
                mark_failed(text)
            return text

        text, _ = self._once(self.failure_file, explain)
        return text or "the rank that was to compare all signs of life ended before it had finished"

    def _once(self, file: Path, explain: Callable[[Observation], str]) -> tuple[str, bool]:
        """(Text of `file`, whether this rank wrote it): the first rank to call this writes the file."""
        try:
            os.close(os.open(file.with_suffix(".begun"), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            return self._wait_for(file), False
        except OSError:
            pass  # the file cannot be written: each rank observes alone
        text = explain(self._observe())
        with contextlib.suppress(OSError), replacing(file) as written:
            written.write(text)
        return text, True

    def _observe(self) -> Observation:
        before = read_all(self.folder, self.size)
        self._pass(SIGNS_TO_WAIT)
        return Observation(before, read_all(self.folder, self.size), self.size)

    def _wait_for(self, file: Path) -> str:
        """The text of `file`; empty when the writing rank takes too long."""
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
