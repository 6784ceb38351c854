"""A failure instead of an endless wait, as for the other end of a FIFO."""

import contextlib
import signal
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(20)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
