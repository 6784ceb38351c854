"""Cuts a long row of tokens into windows, one forward pass each."""

from collections.abc import Iterator
from typing import NamedTuple


class Window(NamedTuple):
    """Tokens [begin, end) of a row. afresh: whether the recurrent state is reset before the window."""

    begin: int
    end: int
    afresh: bool


def windows(length: int, window: int, longest: int) -> Iterator[Window]:
    """Consecutive windows of at most `window` tokens. longest: model.max_length, the most tokens of a sequence that the
    model is built for, after which it begins afresh, whatever `window` is; 0: it has no such limit."""
    longest = longest or length
    for first in range(0, length, longest):
        last = min(first + longest, length)
        for begin in range(first, last, window):
            yield Window(begin, min(begin + window, last), begin == first)
