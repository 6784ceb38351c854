"""The file of human verdicts: append-only JSON lines, each fsynced before it is acknowledged.

The last line of an auditor on a sample is valid, so an edit is a later line. Several processes may append at once. A
killed process may leave a truncated last line; readers skip and count it, and later lines are never joined to it.
"""

import fcntl
import json
import os
import threading
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass as checked_dataclass

from data_pipeline.errors import InputError

VERDICTS = ("keep", "drop", "unsure")


@checked_dataclass(frozen=True, config=ConfigDict(extra="ignore", allow_inf_nan=False))
class Answer:
    """The verdict of `auditor` on a sample. seconds: time spent on it; time: UTC, ISO 8601; blind: whether the filter's
    verdict and scores were hidden before the answer."""

    sample: Annotated[str, Field(min_length=1, max_length=200)]
    verdict: Literal[VERDICTS]
    auditor: Annotated[str, Field(min_length=1, max_length=100)]
    time: str
    seconds: Annotated[float, Field(ge=0)] = 0.0
    note: Annotated[str, Field(max_length=2000)] = ""
    blind: bool = True


ANSWER = TypeAdapter(Answer)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class AnswersFile:
    """A file of answers, re-read as it grows. `latest`: {(sample, auditor): Answer}; `damaged`: number of lines that
    are no answers; `torn`: bytes of a truncated last line. Thread-safe and process-safe."""

    def __init__(self, path: str | Path):
        """Raises InputError naming the file when it cannot be read, or is not a file of answers."""
        self.path = Path(path)
        self.latest: dict[tuple[str, str], Answer] = {}
        self.damaged = 0
        self.torn = 0
        self._read = 0
        self._lock = threading.RLock()
        try:
            self.refresh()
        except OSError as error:
            raise InputError(f"answers={path}: {error.strerror or error}") from None
        if self.damaged and not self.latest:
            raise InputError(f"answers={path}: holds {self.damaged} lines and none is an answer; choose another file")

    def refresh(self) -> None:
        """Reads the lines that any process has appended since. Raises OSError."""
        with self._lock:
            try:
                with self.path.open("rb") as file:
                    file.seek(self._read)
                    whole, newline, torn = file.read().rpartition(b"\n")
            except FileNotFoundError:
                return
            self._read += len(whole) + len(newline)
            self.torn = len(torn)
            for line in whole.split(b"\n"):
                if not line.strip():
                    continue
                try:
                    answer = ANSWER.validate_python(json.loads(line))
                except (ValueError, RecursionError):
                    self.damaged += 1
                    continue
                self.latest[answer.sample, answer.auditor] = answer

    def append(self, answer: Answer) -> None:
        """Appends and fsyncs an answer. On OSError the file is unchanged."""
        line = json.dumps(asdict(answer), ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fresh = not self.path.exists()
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                end = os.lseek(descriptor, 0, os.SEEK_END)
                if end and os.pread(descriptor, 1, end - 1) != b"\n":
                    line = b"\n" + line
                try:
                    _write(descriptor, line)
                    os.fsync(descriptor)
                except OSError:
                    os.ftruncate(descriptor, end)
                    raise
            finally:
                os.close(descriptor)
            if fresh:
                _sync_folder(self.path.parent)
            self.refresh()

    def of(self, auditor: str) -> dict[str, Answer]:
        """{sample: latest answer} of one auditor."""
        with self._lock:
            return {sample: answer for (sample, name), answer in self.latest.items() if name == auditor}

    def all(self) -> list[Answer]:
        """The latest answer of each auditor on each sample."""
        with self._lock:
            return list(self.latest.values())

    def problems(self) -> list[str]:
        """A line about damaged and truncated lines, if any."""
        lines = []
        if self.damaged:
            lines.append(f"{self.path.name}: {self.damaged} damaged line{'s' * (self.damaged > 1)} skipped")
        if self.torn:
            lines.append(f"{self.path.name}: the last line is torn ({self.torn} bytes) and was skipped")
        return lines


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
