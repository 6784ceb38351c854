"""Forward and backward pass of a microbatch, launched kernel by kernel or as one CUDA graph.

Python launches about fifty kernels a layer. Where the kernels are short (small models, few tokens) the GPU waits for
the host; replaying a graph costs the host one launch. A graph holds the addresses of parameters and gradient sums, so
those must not be reallocated.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_tn.device.graph import GraphCache
from megatron_tn.device.streams import on_stream
from megatron_tn.gradients.accumulator import GradientAccumulator
from megatron_tn.model.base import Model, ModelOutput
from megatron_tn.parallel.world import release_on_leaving

EAGER_PASSES = 2  # before the first capture: they compile kernels and initialise libraries, which a capture forbids


class Passes:
    """(tokens, targets, cu_seqlens, scale, last) -> scale x sum of token losses, detached. Adds gradients to
    `accumulator`'s sums, which are complete (phase "whole") after a step's last microbatch."""

    def __init__(self, model: Model, accumulator: GradientAccumulator):
        self.model = model
        self.accumulator = accumulator
        self.watchers: list[Callable[[], None]] = []  # called before and after a replay, which runs no module hooks

    def __call__(self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor | None, scale: Tensor, last: bool) -> Tensor:
        loss = self._pass(tokens, targets, cu_seqlens, scale, last)
        if last:
            self.accumulator.finish()
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
        self.accumulator.backward(loss, last=last)
        return loss.detach()


class CapturedPasses(Passes):
    """`Passes` by CUDA graphs: one graph per (shapes, which sums are empty, whether the pass ends with reductions).

    While a parameter has a gradient hook the pass runs kernel by kernel. stream: the stream to capture on; autograd
    nodes that an engine keeps must have been created on it. None on a CPU, where every pass runs eagerly.
    """

    def __init__(self, model: Model, accumulator: GradientAccumulator, stream: torch.cuda.Stream | None):
        super().__init__(model, accumulator)
        self.stream = stream
        self.eager_passes = 0
        self.graphs = None if stream is None else GraphCache(stream)
        release_on_leaving(self)

    def release(self) -> None:
        """Drop the graphs and their memory; the next pass captures again. Call before destroying NCCL communicators."""
        if self.graphs is not None:
            self.graphs.release()

    def _pass(self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor | None, scale: Tensor, last: bool) -> Tensor:
        inputs = [tokens, targets, cu_seqlens, scale]
        reducing = last and self.accumulator.reduces
        if self.stream is None:
            return super()._pass(*inputs, reducing)
        if any(parameter._backward_hooks for parameter in self.model.parameters()):
            self.release()  # the eager pass needs the graphs' memory
            return super()._pass(*inputs, reducing)
        if self.eager_passes < EAGER_PASSES:
            self.eager_passes += 1
            with on_stream(self.stream):
                return super()._pass(*inputs, reducing)
        shapes = tuple(None if x is None else (x.shape, x.dtype) for x in inputs)
        empty = self.accumulator.empty
        key = (shapes, empty, reducing)
        if key not in self.graphs:
            # model.forward, not model(): its module hooks would run at capture only, not at replays.
            self.graphs.capture(key, lambda *x: self._run(self.model.forward, *x, reducing), inputs)
            self.accumulator.empty = empty  # `_run` marked the sums as written, but a capture executes no kernel
        for watcher in self.watchers:
            watcher()
        loss = self.graphs.replay(key, inputs).clone()
        for watcher in self.watchers:
            watcher()
        self.accumulator.empty = [False] * len(empty)
        return loss


def build_passes(
    model: Model, accumulator: GradientAccumulator, *, cuda_graph: bool, stream: torch.cuda.Stream | None
) -> Passes:
    """`CapturedPasses` if cuda_graph (the setting engine.cuda_graph), else `Passes`."""
    return CapturedPasses(model, accumulator, stream) if cuda_graph else Passes(model, accumulator)


def capture_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A CUDA stream to capture graphs on; None on a CPU."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None
