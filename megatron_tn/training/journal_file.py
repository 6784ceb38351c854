"""The journal's file: one JSON object per line, with its "step"."""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_tn.config import regular, replacing

TAIL_BYTES = 100_000  # about 300 records
APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC


class JournalFile:
    """path: log.jsonl. superseded: file for the records of steps that a rewind or resume will repeat.

    Every line is complete, except the last one if the host died while writing. The file stays open between appends,
    because closing a file on a network file system waits for the server.
    """

    def __init__(self, path: Path, superseded: Path):
        self.path = path
        self.superseded = superseded
        self._descriptor: int | None = None

    def read(self, *keys: str) -> list[dict[str, Any]]:
        """All complete records, or those with one of `keys`, in the order of writing; empty where there is no
        journal."""
        return read_records(self.path, *keys)

    def tail(self, size: int = TAIL_BYTES) -> list[dict[str, Any]]:
        """The complete records in the last `size` bytes: of a run of months the file is large."""
        return read_records(self.path, last=size)

    def append(self, records: list[dict[str, Any]]) -> int:
        """Append records; returns how many were written: all, unless the disk is full.

        NaN and infinity, which JSON lacks, become null.

        Raises:
            OSError: not even the first record could be written.
        """
        if self._descriptor is None:
            self._descriptor = _open_to_append(self.path)
        for count, record in enumerate(records):
            try:
                _append_whole(self._descriptor, _line(record))
            except OSError:
                if not count:
                    raise
                return count
        return len(records)

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def set_aside_after(self, step: int) -> None:
        """Move records of steps after `step`, and a truncated line, to the superseded file. On OSError the journal is
        unchanged."""
        with contextlib.suppress(OSError):  # a network file system reports a failed write on close
            self.close()
        try:
            content = regular(self.path).read_bytes()  # bytes: a truncated line may not be UTF-8
        except FileNotFoundError:
            return
        kept, later = [], []
        for line in content.splitlines():
            try:
                (later if json.loads(line)["step"] > step else kept).append(line)
            except (ValueError, KeyError, TypeError, RecursionError):
                later.append(line)
        if not later and (content.endswith(b"\n") or not content):
            return
        with replacing(self.path, "xb") as file:
            file.write(b"".join(line + b"\n" for line in kept))
            file.flush()
            if later:
                self._append_superseded(later)

    def _append_superseded(self, lines: list[bytes]) -> None:
        descriptor = _open_to_append(self.superseded)
        try:
            _append_whole(descriptor, b"".join(line + b"\n" for line in lines))
        finally:
            os.close(descriptor)


def read_records(path: Path, *keys: str, last: int | None = None) -> list[dict[str, Any]]:
    """All complete records of a file, or of its `last` bytes, in the order of writing; empty where there is no file.
    Raises OSError where it is no regular file. keys: only records that have one of them; other lines are not parsed."""
    found = []
    with contextlib.suppress(FileNotFoundError), regular(path).open("rb") as file:
        if last is not None:
            file.seek(max(os.fstat(file.fileno()).st_size - last, 0))
        for line in _lines(file.read(), keys):
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(line)
                if isinstance(record, dict) and (not keys or any(key in record for key in keys)):
                    found.append(record)
    return found


def _lines(content: bytes, keys: Sequence[str]) -> Iterator[bytes]:
    """The lines that name one of `keys`. No other one is taken apart: of a run of months the file is large."""
    spans = {span for key in keys for span in _spans(content, f'"{key}"'.encode())}
    for begin, end in sorted(spans) if keys else _spans(content, b""):
        yield content[begin:end]


def _spans(content: bytes, named: bytes) -> Iterator[tuple[int, int]]:
    """Begin and end of each line that holds `named`."""
    at = content.find(named)
    while at >= 0:
        begin, end = content.rfind(b"\n", 0, at) + 1, content.find(b"\n", at)
        end = len(content) if end < 0 else end
        yield begin, end
        at = content.find(named, end + 1)


def _line(record: dict[str, Any]) -> bytes:
    finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}
    return json.dumps(finite).encode() + b"\n"


def _open_to_append(path: Path) -> int:
    """Raises OSError where it is no regular file."""
    with contextlib.suppress(FileNotFoundError):
        regular(path)
    return os.open(path, APPEND, 0o666)


def _append_whole(descriptor: int, content: bytes) -> None:
    """Append all of `content` or, on a full disk, nothing: a partial write is truncated again. Raises OSError."""
    size = os.fstat(descriptor).st_size
    done = 0
    try:
        while done < len(content):
            done += os.write(descriptor, content[done:])
    except OSError:
        if done:
            os.ftruncate(descriptor, size)
        raise
