"""Signs of life: where a rank is, in a small file of its own that all ranks can read."""

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

from megatron_tn.training.run_folder import RunFolder

MOST_INTERVAL_S = 5.0  # between two signs of life
BYTES = 4096  # of a sign of life
MOST_TEXT = 1000  # characters of a place or a failure


class Progress:
    """Where this rank is, told by the training loop, and how long it has been in each phase, in seconds.

    phase: one of detect.PHASES. step: the number of the step under way. since: when the phase began, monotonic.
    """

    def __init__(self) -> None:
        self.step = 0
        self.first_step = 0  # of this process
        self.phase = "start"
        self.since = time.monotonic()
        self.seconds: dict[str, float] = defaultdict(float)

    def at(self, phase: str, step: int | None = None) -> None:
        """The rank begins `phase` of step number `step` (None: of the same step)."""
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

    count: how many this process has given; it grows while the process lives. place: the line it stands at. waiting:
    whether it waits there for other ranks or its GPU. failed: the error it ends with, empty while it has none. lost:
    whether that error is another rank's, a collective that broke.
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
        """A file system that does not take it costs the sign and nothing else.

        In place: a network file system shows a changed file at once to who opens it, a replaced one after a while.
        """
        content = self._to_bytes(MOST_TEXT)
        with contextlib.suppress(OSError):
            descriptor = os.open(file_of(folder, self.rank), os.O_CREAT | os.O_WRONLY, 0o644)
            try:
                os.pwrite(descriptor, content, 0)
            finally:
                os.close(descriptor)

    def _to_bytes(self, text: int) -> bytes:
        """BYTES of them, with at most `text` characters of place and failure, fewer where escapes make them long."""
        short = {"place": self.place[:text], "failed": self.failed[:text]}
        content = json.dumps(asdict(self) | short).encode().ljust(BYTES)
        return content if len(content) == BYTES else self._to_bytes(text - 100)

    @classmethod
    def read(cls, path: Path) -> Sign | None:
        """None where there is none, or it is being written."""
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    @property
    def process_has_ended(self) -> bool:
        """Whether it is a process of this host that is no more."""
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
    """rank -> its last sign, for the ranks below `size` that have given one. Opens each file once."""
    found = {rank: Sign.read(file_of(folder, rank)) for rank in range(size)}
    return {rank: sign for rank, sign in found.items() if sign is not None}


def new_folder(run: RunFolder) -> Path:
    """An empty folder for the signs of one start; those of earlier starts are removed. Called on rank 0."""
    shutil.rmtree(run.ranks, ignore_errors=True)
    folder = run.ranks / f"{time.time():.3f}"
    folder.mkdir(parents=True)
    return folder


def living_run(run: RunFolder) -> str:
    """The first rank of a run that is under way in a folder, by its signs of life; empty when there is none.

    Needed where the file system has no locks. Takes 7.5 s where a run on another host ended without saying so.
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
