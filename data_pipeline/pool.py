"""A pool of worker processes that ends cleanly on Ctrl-C."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.context import BaseContext
from typing import Any


class _Pool(ProcessPoolExecutor):
    """Workers start within `submit` and inherit its signal mask: a SIGINT that reaches one before its initializer has
    run waits, and is then ignored."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return super().submit(function, *args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def process_pool(workers: int, context: BaseContext | None = None) -> Iterator[ProcessPoolExecutor]:
    """A pool whose workers ignore SIGINT, which the terminal sends to all processes: on Ctrl-C this process submits no
    further tasks, and workers print no tracebacks."""
    with _Pool(workers, context, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        try:
            yield pool
        except BaseException:
            # Waits for tasks that have begun: with the pool's thread still alive at the interpreter's exit, CPython
            # 3.11 may write to a pipe that the thread has just closed, and print a traceback.
            pool.shutdown(cancel_futures=True)
            raise
