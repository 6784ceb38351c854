"""Prefetching iteration in a thread."""

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

T = TypeVar("T")

STOP_S = 10.0  # wait for the thread's end after `close`


def read_ahead(items: Generator[T], depth: int) -> Iterator[T]:
    """The same items, of which a thread computes up to `depth` in advance.

    An error of `items` is raised in the place of its item. Closing this iterator closes `items` in the thread; a thread
    that hangs in storage access is abandoned after STOP_S.
    """
    ready: queue.Queue = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: object) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def read() -> None:
        try:
            for item in items:
                put((item,))
                if stop.is_set():
                    break
            items.close()
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=read, name="read-ahead", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item[0]
    finally:
        stop.set()
        thread.join(STOP_S)
