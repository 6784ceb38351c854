"""Asks the extracting process, starts it, and ends it when a page takes too long."""

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

from data_pipeline.pages.worker import ANSWER, HEADER, TEXT

ROOT = Path(__file__).resolve().parents[2]


class Refused(ValueError):
    """A page that gives no document: `reason` is a fixed word, `detail` is for people."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class Extractor:
    """One extracting process, started when it is first needed and again after one that had to be ended. A process that
    was forked from this one starts its own: two that share pipes would get each other's answers."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._owner = 0  # the process that started it

    def text(self, data: bytes, label: str | None, *, most_bytes: int, seconds: float) -> str:
        """The main content of a page, in at most `seconds`. Raises Refused."""
        process = self._started()
        name = (label or "").encode("utf-8", "replace")[:1000]
        try:
            for part in (HEADER.pack(len(name), len(data), most_bytes), name, data):
                _write(process.stdin, part)
            until = time.monotonic() + seconds
            kind, size = ANSWER.unpack(self._read(ANSWER.size, until))
            answer = self._read(size, until).decode()
        except TimeoutError:
            self.close()
            raise Refused("too_slow", f"more than {seconds} s for {len(data)} bytes") from None
        except (BrokenPipeError, EOFError):
            code = process.wait()
            self.close()
            # The extractor aborts where it cannot have more memory.
            reason = "too_costly" if code == -signal.SIGABRT else "reader_error"
            raise Refused(reason, f"the extractor ended with code {code} on {len(data)} bytes") from None
        except BaseException:
            self.close()  # whatever it still answers belongs to no other page
            raise
        if kind == TEXT:
            return answer
        raise Refused(*answer.split("\n", 1))

    def close(self) -> None:
        """Ends the process."""
        if self._process and self._owner == os.getpid():
            self._process.kill()
            self._process.communicate()
        self._process = None

    def _started(self) -> subprocess.Popen:
        if self._process is None or self._owner != os.getpid():
            self._owner = os.getpid()
            paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "data_pipeline.pages.worker"],  # -P: no module of the current folder
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # what it says there when it aborts is said by its exit code
                bufsize=0,
                pipesize=1 << 20,  # most pages at once
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )
        return self._process

    def _read(self, size: int, until: float) -> bytes:
        """`size` bytes of its answer. Raises TimeoutError after `until`, EOFError when it has ended."""
        pieces = bytearray()
        while len(pieces) < size:
            if not select.select([self._process.stdout], [], [], max(0, until - time.monotonic()))[0]:
                raise TimeoutError
            if not (piece := self._process.stdout.read(min(size - len(pieces), 1 << 20))):
                raise EOFError
            pieces += piece
        return bytes(pieces)


def _write(pipe: BinaryIO, data: bytes | bytearray) -> None:
    """All of `data`: a write that a signal interrupts is a part of it."""
    left = memoryview(data)
    while left:
        left = left[pipe.write(left) :]
