"""Context managers that run kernels on another CUDA stream, ordered with the current stream."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Run the with-block's kernels on `stream`, after the kernels already queued on the current stream and before those
    queued later. None: run on the current stream."""
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
    """Run the with-block's kernels on `stream`, after the kernels already queued on the current stream; the current
    stream does not wait for them. None: run on the current stream."""
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        yield
