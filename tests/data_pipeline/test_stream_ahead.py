"""Reading ahead in a thread: order, errors, how far, and how it ends."""

import threading
import time

import pytest

from data_pipeline.stream import ahead
from data_pipeline.stream.ahead import read_ahead


class Source:
    """Numbers up to `stop`, then `error`, if any; knows what it made and whether it was closed."""

    def __init__(self, stop: int, error: BaseException | None = None):
        self.stop, self.error, self.made, self.closed = stop, error, 0, False

    def __iter__(self):
        try:
            for number in range(self.stop):
                self.made += 1
                yield number
            if self.error:
                raise self.error
        finally:
            self.closed = True


def eventually(condition) -> bool:
    until = time.time() + 10
    while not condition() and time.time() < until:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize("depth", [1, 3])
def test_all_items_in_order(depth):
    source = Source(20)
    assert list(read_ahead(iter(source), depth)) == list(range(20))
    assert source.closed


def test_none_is_an_item():
    assert list(read_ahead((item for item in (None, 1, None)), 2)) == [None, 1, None]


def test_no_further_ahead_than_asked_for():
    source = Source(100)
    items = read_ahead(iter(source), 3)
    assert next(items) == 0
    assert eventually(lambda: source.made == 5)  # 3 wait, and the thread holds one more
    time.sleep(0.3)
    assert source.made == 5
    items.close()
    assert source.closed
    assert not any(thread.name == "read-ahead" for thread in threading.enumerate())


def test_an_error_comes_where_its_item_would_have():
    items = read_ahead(iter(Source(2, ValueError("damaged"))), 8)
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(ValueError, match="damaged"):
        next(items)


def test_a_source_that_never_answers_does_not_hold_up_the_end(monkeypatch):
    monkeypatch.setattr(ahead, "STOP_S", 0.2)
    answer = threading.Event()

    def silent():
        yield 1
        answer.wait()

    items = read_ahead(silent(), 2)
    assert next(items) == 1
    began = time.time()
    items.close()
    assert time.time() - began < 5
    answer.set()
