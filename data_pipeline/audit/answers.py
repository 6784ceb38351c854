"""The file of people's verdicts: JSON lines, only ever appended to, each on disk before it is acknowledged.

Of the lines of one auditor on one sample the last counts, so an edit is a later line. Several processes may append at
once. A killed process may leave its last line torn; it is skipped, counted, and never joined to the next.
"""

import fcntl
import json
import os
import threading
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from data_pipeline.errors import InputError

VERDICTS = ("keep", "drop", "unsure")


@checked_dataclass(frozen=True, config=ConfigDict(extra="ignore", allow_inf_nan=False))
class Answer:
    """What `auditor` says of a sample. seconds: for how long it was looked at; time: UTC, ISO 8601; blind: whether the
    filter's verdict and the scores were hidden until then."""

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
    """A file of answers, read as it is and as it grows. `latest`: {(sample, auditor): Answer}; `damaged`: how many
    lines are none; `torn`: bytes at the end that no newline closes. Safe for threads, and beside other processes."""

    def __init__(self, path: str | Path):
        """Raises InputError naming the file when it cannot be read, or holds something else."""
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
        """Takes up what was appended since, by whomever. Raises OSError."""
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
                except (ValueError, ValidationError):
                    self.damaged += 1
                    continue
                self.latest[answer.sample, answer.auditor] = answer

    def append(self, answer: Answer) -> None:
        """Returns once the answer is on disk; raises OSError, and leaves the file as it was, when it cannot be."""
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
        """{sample: the answer that counts} of one auditor."""
        with self._lock:
            return {sample: answer for (sample, name), answer in self.latest.items() if name == auditor}

    def all(self) -> list[Answer]:
        """The answers that count, of all auditors."""
        with self._lock:
            return list(self.latest.values())

    def problems(self) -> list[str]:
        """A line for what could not be read."""
        lines = []
        if self.damaged:
            lines.append(f"{self.path.name}: {self.damaged} damaged line{'s' * (self.damaged > 1)} skipped")
        if self.torn:
            lines.append(f"{self.path.name}: the last line is torn ({self.torn} bytes) and was skipped")
        return lines


def read_answers(path: str | Path) -> list[Answer]:
    """The answers that count; none when there is no file. Raises InputError."""
    return AnswersFile(path).all()


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
