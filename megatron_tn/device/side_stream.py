"""A side CUDA stream for kernels whose results are not needed soon: the matrix products of weight gradients.

The tiles of a matrix product seldom fill the last wave of a GPU's multiprocessors (SMs): the gradient of an SGLU weight
at D = 2048 has 352 tiles on 132 SMs, 2.67 waves that take the time of 3. Weight gradients are read only at the end of
the backward pass, so on a side stream the last wave overlaps with the next kernel of the main stream. Inside a CUDA
graph the two streams become branches without host cost; outside a graph the events cost more than the overlap gains,
so there the products stay on the main stream.
"""

import collections
import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

MAX_PENDING = 4  # side-stream blocks in flight, whose inputs are kept alive


class _Pending(NamedTuple):
    done: torch.cuda.Event
    inputs: tuple[Tensor, ...]  # kept alive: the allocator could reuse their memory on the main stream


_streams: dict[torch.device, torch.cuda.Stream] = {}
_pending: collections.deque[_Pending] = collections.deque()


@contextlib.contextmanager
def on_side_stream(*inputs: Tensor) -> Iterator[None]:
    """During CUDA graph capture: run the with-block's kernels, which read `inputs`, on the side stream.

    Blocks run in order, each after the kernels already queued on the main stream. Results may be read after
    `wait_for_side_stream`. Without capture, and on a CPU, the block runs on the current stream.
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
    """Make the current stream wait for all `on_side_stream` blocks, and release the blocks' inputs."""
    while _pending:
        block = _pending.popleft()
        torch.cuda.current_stream(block.inputs[0].device).wait_event(block.done)
