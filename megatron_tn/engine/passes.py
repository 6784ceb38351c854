"""A microbatch's forward and backward pass, as it is or as one CUDA graph: captured once, replayed by a single launch.

Python launches about fifty kernels a layer. Where they are short (small models, few tokens) the GPU waits for it; a
replay leaves the host nothing to do. The graph holds the addresses of parameters and gradient sums, which never move.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_tn.model.transnormer import ModelOutput, TransNormerLM
from megatron_tn.parallel.beside import join
from megatron_tn.parallel.main_gradient import MainGradient
from megatron_tn.parallel.reduction import OverlappedReduction
from megatron_tn.parallel.world import release_on_leaving

WARM_UP = 2  # eager passes before the first capture: kernels are compiled, and choices made, in them


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor | None]
    loss: Tensor


def capture_stream(device: torch.device) -> torch.cuda.Stream | None:
    """The stream that passes are captured on; None on a CPU, where nothing is."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


@contextlib.contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Work of the block runs on `stream`, after what is queued, and before what comes after the block."""
    if stream is None:
        yield
        return
    outside = torch.cuda.current_stream(stream.device)
    stream.wait_stream(outside)
    with torch.cuda.stream(stream):
        yield
    outside.wait_stream(stream)


class Passes:
    """(tokens, targets, cu_seqlens, scale, last) -> scale x the sum of token losses, detached, with gradients in
    `mains`; after the last microbatch of a step these are whole and, by `reduction`, summed over ranks."""

    def __init__(self, model: TransNormerLM, mains: Sequence[MainGradient], reduction: OverlappedReduction):
        self.model = model
        self.mains = mains
        self.reduction = reduction
        self.watchers: list[Callable[[], None]] = []  # called before and after a replay, which calls no hook

    def __call__(self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor | None, scale: Tensor, last: bool) -> Tensor:
        loss = self._pass(tokens, targets, cu_seqlens, scale, last)
        if last:
            for main in self.mains:
                main.finish()
        return loss

    def _pass(self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor | None, scale: Tensor, last: bool) -> Tensor:
        return self._run(self.model, tokens, targets, cu_seqlens, scale, last)

    def _run(
        self,
        call: Callable[..., ModelOutput],
        tokens: Tensor,
        targets: Tensor,
        cu_seqlens: Tensor | None,
        scale: Tensor,
        last: bool,
    ) -> Tensor:
        loss = call(tokens, targets=targets, cu_seqlens=cu_seqlens, reduction="sum").loss * scale
        if last:
            self.reduction.begin()
        loss.backward()
        join()
        if last:
            self.reduction.wait()
        return loss.detach()


class CapturedPasses(Passes):
    """The same, replayed. A graph for each shape of microbatch, and others for those that find the sums empty, writing
    and adding being different, and for a step's last. On a CPU, and while a hook wants to see gradients, passes run as
    they are.

    stream: of `capture_stream`; the one on which whatever keeps nodes of the backward graph was made.
    """

    def __init__(
        self,
        model: TransNormerLM,
        mains: Sequence[MainGradient],
        reduction: OverlappedReduction,
        stream: torch.cuda.Stream | None,
    ):
        super().__init__(model, mains, reduction)
        self.stream = stream
        self.eager = 0
        self.graphs: dict[tuple, _Graph] = {}
        release_on_leaving(self)

    def release(self) -> None:
        """Drop the graphs, with their memory. They are captured again where they are wanted."""
        for captured in self.graphs.values():
            captured.graph.reset()
        self.graphs.clear()

    def _pass(self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor | None, scale: Tensor, last: bool) -> Tensor:
        inputs = [tokens, targets, cu_seqlens, scale]
        last = last and bool(self.reduction.buckets)  # else it is a microbatch like any other
        if any(parameter._backward_hooks for parameter in self.model.parameters()):
            self.release()  # their memory is wanted
            return super()._pass(*inputs, last)
        if self.stream is None:
            return super()._pass(*inputs, last)
        if self.eager < WARM_UP:
            self.eager += 1
            with on_stream(self.stream):
                return super()._pass(*inputs, last)
        shapes = tuple(None if x is None else (x.shape, x.dtype) for x in inputs)
        key = (*shapes, last, tuple(main.empty for main in self.mains))
        if key not in self.graphs:
            self.graphs[key] = self._capture(inputs, last)
        found = self.graphs[key]
        for place, value in zip(found.inputs, inputs, strict=True):
            if place is not None:
                place.copy_(value, non_blocking=True)
        for watcher in self.watchers:
            watcher()
        found.graph.replay()
        for watcher in self.watchers:
            watcher()
        for main in self.mains:
            main.empty = False
        return found.loss.clone()

    def _capture(self, inputs: list[Tensor | None], last: bool) -> _Graph:
        places = [None if x is None else x.clone() for x in inputs]
        empty = [main.empty for main in self.mains]
        graph = torch.cuda.CUDAGraph()
        # One pool for all: graphs run one after the other, and leave nothing behind but the loss, which is copied.
        pool = next(iter(self.graphs.values())).graph.pool() if self.graphs else None
        # Other threads (the batch loader's, which pins memory, and NCCL's watchdog) go on calling into CUDA meanwhile.
        mode = "thread_local"
        # Not a call of the model, whose hooks would be captured instead of run.
        with torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode=mode):
            loss = self._run(self.model.forward, *places, last)
        for main, was in zip(self.mains, empty, strict=True):
            main.empty = was  # nothing has run yet
        return _Graph(graph, places, loss)
