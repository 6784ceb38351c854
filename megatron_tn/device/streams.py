"""Blocks of kernels on a CUDA stream of their own, in order with the current one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Run the block's kernels on `stream`: after what the current stream has queued, and before what it queues next.
    None: on the current stream."""
    if stream is None:
        yield
        return
    outside = torch.cuda.current_stream(stream.device)
    stream.wait_stream(outside)
    with torch.cuda.stream(stream):
        yield
    outside.wait_stream(stream)


@contextlib.contextmanager
def on_stream_after(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Run the block's kernels on `stream`, after what the current stream has queued; what the current stream queues
    next does not wait for them. None: on the current stream."""
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        yield
