"""Work that nothing waits for soon, run beside what the device would otherwise do alone.

A matrix product keeps every multiprocessor to itself, and its last wave of tiles leaves some idle: the gradient of an
SGLU weight at D 2048, 352 tiles on 132 of them, takes three waves where 2.67 would do. Weights' gradients are wanted at
the end of the backward pass alone, so a stream of their own lets others' work fill such ends. Within a CUDA graph,
where streams become branches, that costs the host nothing.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

IN_FLIGHT = 4  # products whose inputs are kept, until the pass waits for the first of them


class _Work(NamedTuple):
    done: torch.cuda.Event
    inputs: tuple[Tensor, ...]  # kept: freed memory goes to the pass at once, which knows of its own stream alone


_streams: dict[torch.device, torch.cuda.Stream] = {}
_in_flight: collections.deque[_Work] = collections.deque()


@contextlib.contextmanager
def beside(*inputs: Tensor) -> Iterator[None]:
    """Work of the block, which reads `inputs`, has until `join` where a CUDA graph is captured. Such blocks run one
    after the other. Elsewhere, and on a CPU, it is done as it stands."""
    if not (inputs[0].is_cuda and torch.cuda.is_current_stream_capturing()):
        yield
        return
    device = inputs[0].device
    here = torch.cuda.current_stream(device)
    if (stream := _streams.get(device)) is None:
        stream = _streams[device] = torch.cuda.Stream(device)
    while len(_in_flight) >= IN_FLIGHT:
        here.wait_event(_in_flight.popleft().done)
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        yield
    _in_flight.append(_Work(stream.record_event(), inputs))


def join() -> None:
    """What comes after this finds the work of every `beside` block done."""
    while _in_flight:
        work = _in_flight.popleft()
        torch.cuda.current_stream(work.inputs[0].device).wait_event(work.done)
