"""CUDA graphs: kernels captured once and launched together by one host call."""

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Held during a capture, and by other threads during long CUDA calls that shall not fall into one.
CAPTURE = threading.Lock()


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor | None]  # the addresses that the graph reads
    output: Tensor


class GraphCache:
    """One CUDA graph per key, captured at the key's first use, all in one memory pool.

    A graph holds the addresses of all tensors that its function reads or writes, so those tensors must not be
    reallocated. The graphs share memory and must run one at a time; the next replay of any graph overwrites an output,
    so clone the output first.
    """

    def __init__(self, stream: torch.cuda.Stream):
        self.stream = stream
        self._graphs: dict[Hashable, _Captured] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._graphs

    def capture(self, key: Hashable, function: Callable[..., Tensor], inputs: Sequence[Tensor | None]) -> None:
        """Record `function(*inputs)` under `key`. Nothing runs on the device."""
        places = [None if x is None else x.clone() for x in inputs]
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values())).graph.pool() if self._graphs else None
        # "thread_local": CUDA calls of other threads (the batch loader's memory pinning, NCCL's watchdog) are allowed.
        with CAPTURE, torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode="thread_local"):
            output = function(*places)
        self._graphs[key] = _Captured(graph, places, output)

    def replay(self, key: Hashable, inputs: Sequence[Tensor | None]) -> Tensor:
        """Copy `inputs` to the captured addresses and run the graph of `key`; returns its output, not a clone."""
        found = self._graphs[key]
        for place, value in zip(found.inputs, inputs, strict=True):
            if place is not None:
                place.copy_(value, non_blocking=True)
        found.graph.replay()
        return found.output

    def release(self) -> None:
        """Drop every graph and its memory."""
        for captured in self._graphs.values():
            captured.graph.reset()
        self._graphs.clear()
