"""Client of the extraction process: starts it, sends pages, and kills it when a page takes too long."""

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

from data_pipeline.pages.messages import ANSWER, HEADER, TEXT

ROOT = Path(__file__).resolve().parents[2]


class Refused(ValueError):
    """A page without a document: `reason` is a fixed word, `detail` a message."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class Extractor:
    """An extraction process, started at first use and again after it was killed. A forked process starts its own,
    because two processes on the same pipes would get each other's answers."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._owner = 0  # pid of the process that started the extractor

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
            # The extractor aborts when it exceeds its memory limit.
            reason = "too_costly" if code == -signal.SIGABRT else "reader_error"
            raise Refused(reason, f"the extractor ended with code {code} on {len(data)} bytes") from None
        except BaseException:
            self.close()  # a late answer must not be read as the next page's
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
                stderr=subprocess.DEVNULL,  # its exit code tells of an abort
                bufsize=0,
                pipesize=1 << 20,  # holds most pages whole
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )
        return self._process

    def _read(self, size: int, until: float) -> bytes:
        """`size` bytes of the answer. Raises TimeoutError at time `until`, EOFError when the process has ended."""
        pieces = bytearray()
        while len(pieces) < size:
            if not select.select([self._process.stdout], [], [], max(0, until - time.monotonic()))[0]:
                raise TimeoutError
            if not (piece := self._process.stdout.read(min(size - len(pieces), 1 << 20))):
                raise EOFError
            pieces += piece
        return bytes(pieces)


EXTRACTOR = Extractor()  # one per process; ends with it


def _write(pipe: BinaryIO, data: bytes | bytearray) -> None:
    """Writes all of `data`, repeating partial writes."""
    left = memoryview(data)
    while left:
        left = left[pipe.write(left) :]
