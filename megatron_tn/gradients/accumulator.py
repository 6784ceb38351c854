"""The gradient sums of a step: who adds to them, when they are whole, and their reduction over data-parallel ranks.

Phases of every sum, in order, each step:

    empty    nothing was added in this step; the memory holds anything
    adding   some microbatches' gradients are in
    whole    after the last microbatch: zero where no gradient came, and reduced over ranks; the optimizer may read it

Sums lie in buckets, flat buffers that are reduced as one. In the last microbatch a bucket's reduction starts as soon as
the gradients of all its parameters are in, while the backward pass goes on with earlier layers (PyTorch's DDP,
arXiv 2006.15704, section 3.2.3). Under ZeRO each rank updates one equal part of every bucket (arXiv 1910.02054, section
5.1) and is sent that part alone: half the traffic of an all-reduce.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_tn.device.side_stream import on_side_stream, wait_for_side_stream
from megatron_tn.parallel.context import Axis
from megatron_tn.precision.gradient_sum import GradientSum


@dataclass(frozen=True)
class Bucket:
    """parameters, and the flat fp32 buffer that begins with their sums, in their order. What follows is padding."""

    parameters: Sequence[nn.Parameter]
    flat: Tensor

    def sums(self) -> list[Tensor]:
        """Views of `flat`, one a parameter, of its shape."""
        sizes = [parameter.numel() for parameter in self.parameters]
        views = self.flat.narrow(0, 0, sum(sizes)).split(sizes)
        return [view.view(parameter.shape) for view, parameter in zip(views, self.parameters, strict=True)]


class GradientAccumulator:
    """Sums over microbatches, and at the end over `axis`, of the gradients of every bucket's parameters.

    Operators that can, add to `parameter.gradient_sum` themselves (precision/gradient_sum.py); what autograd hands over
    is added by this class's hook.

    partitioned: after the reduction, rank n holds the nth of axis.size equal parts of every buffer, and nothing of use
    in the others; else every rank holds all.
    """

    def __init__(self, buckets: Sequence[Bucket], axis: Axis, *, partitioned: bool = False):
        self.axis = axis
        self.partitioned = partitioned
        self.buckets = list(buckets)
        self.sums: list[GradientSum] = []
        self._missing: list[int] = []  # per bucket, gradients not in yet; only during the last microbatch's backward
        self._works: list[dist.Work] = []
        for index, bucket in enumerate(self.buckets):
            for parameter, view in zip(bucket.parameters, bucket.sums(), strict=True):
                parameter.gradient_sum = GradientSum(view)
                self.sums.append(parameter.gradient_sum)
                parameter.register_post_accumulate_grad_hook(_GradientHook(self, index))
        if self.reduces:
            # NCCL makes a group's communicator at its first collective, which a CUDA graph cannot capture.
            for work in self._reduce(self.buckets[0].flat.new_zeros(axis.size)):
                work.wait()

    @property
    def reduces(self) -> bool:
        """Whether sums cross ranks at all."""
        return self.axis.size > 1

    @property
    def empty(self) -> tuple[bool, ...]:
        """For each sum, whether it is empty. The first addition writes and later ones add, so a CUDA graph of a
        microbatch is valid only for the same tuple."""
        return tuple(sum.empty for sum in self.sums)

    @empty.setter
    def empty(self, values: Sequence[bool]) -> None:
        for sum, value in zip(self.sums, values, strict=True):
            sum.empty = value

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of `loss`. After the last microbatch of a step the sums are reduced over ranks."""
        if last and self.reduces:
            self._missing = [len(bucket.parameters) for bucket in self.buckets]
        loss.backward()
        wait_for_side_stream()
        if last:
            self._finish_reductions()

    def finish(self) -> None:
        """After the last microbatch: the sums are whole, zero where nothing was added; the next addition overwrites."""
        for sum in self.sums:
            sum.begun()
            sum.empty = True

    def _finish_reductions(self) -> None:
        """Reduce the buckets in which some parameter had no gradient; wait for all reductions."""
        for index, count in enumerate(self._missing):
            if count:
                self._start(index)
        self._missing = []
        for work in self._works:
            work.wait()
        self._works.clear()

    def _arrived(self, index: int) -> None:
        """A parameter of bucket `index` has its gradient of this microbatch."""
        if not self._missing:
            return
        self._missing[index] -= 1
        if not self._missing[index]:
            self._start(index)

    @torch.no_grad()
    def _start(self, index: int) -> None:
        bucket = self.buckets[index]
        for parameter in bucket.parameters:
            parameter.gradient_sum.begun()  # zero, if no gradient came
        with on_side_stream(bucket.flat):  # behind the products that write the sums
            self._works += self._reduce(bucket.flat)

    def _reduce(self, flat: Tensor) -> list[dist.Work]:
        group = self.axis.group
        if not self.partitioned:
            return [dist.all_reduce(flat, group=group, async_op=True)]
        parts = flat.chunk(self.axis.size)
        if flat.is_cuda:
            return [dist.reduce_scatter_tensor(parts[self.axis.rank], flat, group=group, async_op=True)]
        # Gloo's reduce_scatter keeps a copy of `flat` until it is waited for; a reduce per part keeps none.
        return [dist.reduce(part, group=group, group_dst=rank, async_op=True) for rank, part in enumerate(parts)]


class _GradientHook:
    """Called by autograd once a microbatch, when `parameter` has its gradient, or an operator has added it.

    It refers to the accumulator weakly: parameters keep their hooks, and must not keep the sums alive.
    """

    def __init__(self, accumulator: GradientAccumulator, bucket: int):
        self._accumulator, self._bucket = weakref.ref(accumulator), bucket

    @torch.no_grad()
    def __call__(self, parameter: nn.Parameter) -> None:
        if parameter.grad is not None:  # None: an operator added it to the sum
            parameter.gradient_sum.add(parameter.grad)
            parameter.grad = None
        if (accumulator := self._accumulator()) is not None:
            accumulator._arrived(self._bucket)


def split_into_buckets(parameters: Sequence[nn.Parameter], elements: int) -> list[list[nn.Parameter]]:
    """`parameters`, in the model's order, cut into runs of at least `elements` elements, the last run first, since the
    backward pass makes the last parameters' gradients first. The first parameters' run may be shorter."""
    found, members, count = [], [], 0
    for parameter in reversed(parameters):
        members.insert(0, parameter)
        count += parameter.numel()
        if count >= elements:
            found.append(members)
            members, count = [], 0
    return [*found, members] if members else found
