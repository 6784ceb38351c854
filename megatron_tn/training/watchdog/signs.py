"""Signs of life (heartbeats): each rank writes its phase and source line to its own small file."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_tn.config import ConfigError
from megatron_tn.training.run_folder import RunFolder

MOST_INTERVAL_S = 5.0  # longest heartbeat interval
BYTES = 4096  # size of a sign's file
MOST_TEXT = 1000  # characters of `place` or `failed`


class Progress:
    """This rank's phase and step, set by the training loop, and seconds spent in each phase.

    phase: one of detect.PHASES. step: number of the current step. since: start of the phase, monotonic clock.
    """

    def __init__(self) -> None:
        self.step = 0
        self.first_step = 0  # first step of this process
        self.phase = "start"
        self.since = time.monotonic()
        self.seconds: dict[str, float] = defaultdict(float)

    def at(self, phase: str, step: int | None = None) -> None:
        """Set the phase, and the step number unless it is None."""
        now = time.monotonic()
        self.seconds[self.phase] += now - self.since
        self.phase, self.since = phase, now
        self.step = self.step if step is None else step
        if phase == "step":
            self.first_step = self.first_step or self.step

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        before = self.phase
        self.at(phase)
        yield
        self.at(before)


@dataclass(frozen=True)
class Sign:
    """A sign of life.

    count: number of this sign, growing while the process lives. place: source line of the main thread. waiting: whether
    the thread waits for other ranks or its GPU. failed: the rank's error, empty without one. lost: whether the error is
    a collective that another rank broke.
    """

    rank: int
    host: str
    pid: int
    count: int = 0
    step: int = 0
    phase: str = "start"
    place: str = ""
    waiting: bool = False
    failed: str = ""
    lost: bool = False

    @property
    def name(self) -> str:
        return f"rank {self.rank} (host {self.host}, process {self.pid})"

    def write(self, folder: Path) -> None:
        """Write the sign; a failed write is ignored.

        Rewritten in place: on a network file system, readers see a changed file on open, but a replaced one late.
        """
        content = self._to_bytes(MOST_TEXT)
        with contextlib.suppress(OSError):
            descriptor = os.open(file_of(folder, self.rank), os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o644)
            try:
                os.pwrite(descriptor, content, 0)
            finally:
                os.close(descriptor)

    def _to_bytes(self, text: int) -> bytes:
        """JSON of BYTES bytes, with at most `text` characters of place and failed; fewer if JSON escapes need space."""
        short = {"place": self.place[:text], "failed": self.failed[:text]}
        content = json.dumps(asdict(self) | short).encode().ljust(BYTES)
        return content if len(content) == BYTES else self._to_bytes(text - 100)

    @classmethod
    def read(cls, path: Path) -> Sign | None:
        """The sign in `path`; None where it is absent or partly written."""
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError, RecursionError):
            return None

    @property
    def process_has_ended(self) -> bool:
        """Whether the sign's process ran on this host and has ended."""
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return False


def file_of(folder: Path, rank: int) -> Path:
    return folder / f"{rank:05d}.json"


def read_all(folder: Path, size: int) -> dict[int, Sign]:
    """rank -> its last sign, for the ranks below `size` that have written one. Opens each file once."""
    found = {rank: Sign.read(file_of(folder, rank)) for rank in range(size)}
    return {rank: sign for rank, sign in found.items() if sign is not None}


def new_folder(run: RunFolder) -> Path:
    """An empty folder for the signs of one start; those of earlier starts are removed. Called on rank 0. Raises
    ConfigError."""
    shutil.rmtree(run.ranks, ignore_errors=True)
    folder = run.ranks / f"{time.time():.3f}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"run_dir={run}: its folder {run.ranks.name} cannot be written: {error.strerror}") from None
    return folder


def died(run: RunFolder) -> bool:
    """Whether rank 0 of the run's last start ran on this host, and its process has ended."""
    last = [Sign.read(path) for path in run.ranks.glob("*/00000.json")]
    return bool(last) and all(sign is not None and sign.process_has_ended for sign in last)


def living_run(run: RunFolder) -> str:
    """The name of rank 0 of a run that lives in the folder, by its signs of life; "" without one.

    For file systems without locks. Takes 7.5 s after a run on another host that was killed.
    """
    if run.status().get("state") != "running":
        return ""
    before = {path: Sign.read(path) for path in run.ranks.glob("*/00000.json")}
    before = {path: sign for path, sign in before.items() if sign is not None and not sign.process_has_ended}
    if not before:
        return ""
    time.sleep(1.5 * MOST_INTERVAL_S)
    after = {path: Sign.read(path) or sign for path, sign in before.items()}
    return next((sign.name for path, sign in after.items() if sign.count != before[path].count), "")
