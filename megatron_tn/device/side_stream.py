"""A side CUDA stream for kernels whose results are read late, such as the products for the weights' gradients.

The tiles of a matrix product seldom fill the last wave of a GPU's multiprocessors: the gradient of an SGLU weight at D
2048 has 352 tiles for 132 multiprocessors, which is three waves where 2.67 would do. A weight's gradient is read at the
end of the backward pass, so on a stream of its own its last wave overlaps with the next kernel of the main stream.
Inside a CUDA graph streams become branches, and the overlap costs the host nothing; outside a graph the events cost
more than the overlap brings, so there the work stays on the main stream.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

MAX_PENDING = 4  # side-stream blocks whose inputs are kept alive at once


class _Pending(NamedTuple):
    done: torch.cuda.Event
    inputs: tuple[Tensor, ...]  # kept alive: the allocator would hand freed memory to the main stream at once


_streams: dict[torch.device, torch.cuda.Stream] = {}
_pending: collections.deque[_Pending] = collections.deque()


@contextlib.contextmanager
def on_side_stream(*inputs: Tensor) -> Iterator[None]:
    """Run the block's kernels, which read `inputs`, on the side stream, while a CUDA graph is being captured.

    Blocks run in order, each after what the main stream has queued so far; their results may be read after
    `wait_for_side_stream`. Without a capture, and on a CPU, the block runs on the current stream.
    """
    if not (inputs[0].is_cuda and torch.cuda.is_current_stream_capturing()):
        yield
        return
    device = inputs[0].device
    main = torch.cuda.current_stream(device)
    if (side := _streams.get(device)) is None:
        side = _streams[device] = torch.cuda.Stream(device)
    while len(_pending) >= MAX_PENDING:
        main.wait_event(_pending.popleft().done)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        yield
    _pending.append(_Pending(side.record_event(), inputs))


def wait_for_side_stream() -> None:
    """Have the current stream wait for every `on_side_stream` block, and let go of the blocks' inputs."""
    while _pending:
        block = _pending.popleft()
        torch.cuda.current_stream(block.inputs[0].device).wait_event(block.done)
