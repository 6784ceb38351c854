"""Threads for work that waits for the disk or for memory, or that computes without Python's lock."""

import queue
import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

Item = TypeVar("Item")
THREADS = 4


def start_thread(function: Callable[[], None], name: str) -> threading.Thread:
    """Run `function` in a daemon thread on the CUDA device of this thread.

    A new thread's device is 0: without this, its CUDA calls on another rank would create a context on GPU 0. A daemon:
    when the run fails elsewhere, the process exits even if an access to the disk hangs.
    """
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> None:
        if device is not None:
            torch.cuda.set_device(device)
        function()

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread


def in_parallel(function: Callable[[Item], None], items: Iterable[Item], threads: int = THREADS) -> None:
    """Call `function` with every item, in `threads` threads. Grad mode and the like are those of a new thread.

    `items` is iterated in the calling thread, at most `threads` + 2 items ahead of the calls that have returned. After
    an error no further call begins; when all threads have ended, the first error is raised.
    """
    waiting: queue.Queue[tuple[Item] | None] = queue.Queue(maxsize=1)
    errors: list[BaseException] = []

    def work() -> None:
        while (entry := waiting.get()) is not None:
            try:
                if not errors:
                    function(*entry)
            except BaseException as error:  # raised below, in the calling thread
                errors.append(error)

    started = [start_thread(work, f"{threading.current_thread().name}-{number}") for number in range(threads)]
    try:
        for item in items:
            if errors:
                break
            waiting.put((item,))
    finally:
        for _ in started:
            waiting.put(None)
        for thread in started:
            thread.join()
    if errors:
        raise errors[0]
