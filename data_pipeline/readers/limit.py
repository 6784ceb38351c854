"""A limit of the CPU time that a document takes to read.

It counts CPU time, so that a slow disk, a slow network and other programs cost no document. The exception is raised
between two steps of Python: a call of orjson, pyarrow or zlib ends first, in a time linear in its bounded bytes.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator


class TooSlow(Exception):
    """The limit is exceeded."""


@contextlib.contextmanager
def cpu_seconds(most: float) -> Iterator[None]:
    """Raises TooSlow in the block when this process has used `most` seconds of CPU time in it. Signals reach the main
    thread only; elsewhere there is no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGPROF, _raise)
    try:
        signal.setitimer(signal.ITIMER_PROF, most)
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _raise(*_) -> None:
    raise TooSlow
