"""Command lines of this project as subprocesses, several side by side, up to a common deadline."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import Popen, TimeoutExpired

TAIL = 15  # lines of a log in a message
GRACE_S = 60.0  # seconds that a program has to save after it was told to stop
POLL_S = 0.5  # seconds until a running program's deadline is looked at again: `Programs.stop` may have set it


class Failed(Exception):
    """A command of the project failed; the message names the command, its log and the log's last lines."""


class TimeUp(Exception):
    """The deadline has passed, or `Programs.stop` was called, before the command was started or while it ran."""


def end_of(log: Path) -> str:
    """The last lines of a program's log, without the frames of C++ that an aborted program prints after its error."""
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join([line for line in lines if line and not line.startswith("frame #")][-TAIL:])


class Programs:
    """Runs command lines of this project. deadline: `time.monotonic()` after which running ones are told to stop, by
    SIGTERM, and no further one starts; None for none."""

    def __init__(self, deadline: float | None = None):
        self.deadline = deadline
        self._stopped = threading.Event()

    def run(self, module: str, words: Sequence[str], log: Path, gpu: str | None = None) -> None:
        """`python -m module words`, with its output in `log`; with a `gpu`, by its index, no other one is seen.
        Raises Failed and TimeUp."""
        if self.left() == 0:
            raise TimeUp
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
        with log.open("a") as file:
            program = Popen([sys.executable, "-m", module, *words], stdout=file, stderr=file, env=environment)
            while (left := self.left()) != 0:
                with contextlib.suppress(TimeoutExpired):
                    code = program.wait(POLL_S if left is None else min(left, POLL_S))
                    break
            else:
                program.send_signal(signal.SIGTERM)
                try:
                    program.wait(GRACE_S)
                except TimeoutExpired:
                    program.kill()
                raise TimeUp
        if code:
            if self.left() == 0:  # a signal to the process group has reached the program, too
                raise TimeUp
            raise Failed(f"python -m {module} {' '.join(words)}: exit code {code}; the end of {log}:\n{end_of(log)}")

    def stop(self) -> None:
        """Tell the running commands to stop; no further one starts."""
        self.deadline = time.monotonic()

    def left(self) -> float | None:
        if self._stopped.is_set():
            return 0
        return None if self.deadline is None else max(self.deadline - time.monotonic(), 0)

    def side_by_side(self, tasks: Sequence[Callable[[], None]], at_once: int) -> None:
        """Call the tasks, `at_once` at a time. After a failure no further command starts; those that run end. Raises
        Failed and TimeUp."""

        def call(task: Callable[[], None]) -> None:
            try:
                task()
            except Failed:
                self._stopped.set()
                raise

        with ThreadPoolExecutor(at_once) as pool:
            results = [pool.submit(call, task) for task in tasks]
        errors = [error for result in results if (error := result.exception())]
        for error in sorted(errors, key=lambda error: isinstance(error, TimeUp)):
            raise error
