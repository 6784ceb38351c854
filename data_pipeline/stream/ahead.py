"""Iterating in a thread, ahead of whoever wants the items."""

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

T = TypeVar("T")

STOP_S = 10.0  # how long a thread that is no longer wanted is waited for


def read_ahead(items: Generator[T], depth: int) -> Iterator[T]:
    """The same items, of which a thread makes up to `depth` while nobody asks for one.

    An error ends the iteration where its item would have come. Closing this closes `items`, in its thread; one that
    waits for storage that does not answer is left behind.
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
