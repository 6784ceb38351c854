"""Gradient sums over the microbatches of a step, and their reduction over data-parallel ranks.

Phases of every sum within a step:

    empty    nothing added yet; the memory is uninitialised
    adding   gradients of some microbatches are added
    whole    after the last microbatch: reduced over ranks, and zero if no gradient was added; the optimizer may read it

gradients/phase.py refuses an addition to whole sums, and a step on sums that are not whole.

Sums are views of buckets: flat buffers, one collective each. In the last microbatch a bucket's reduction starts as
soon as all its parameters have their gradients, and overlaps with the backward pass of earlier layers (PyTorch's DDP,
arXiv 2006.15704, section 3.2.3). Under ZeRO each rank updates one equal part of every bucket (arXiv 1910.02054, section
5.1), so a reduce-scatter replaces the all-reduce, with half its traffic.
"""

import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_tn.device.side_stream import on_side_stream, wait_for_side_stream
from megatron_tn.parallel.context import Axis
from megatron_tn.precision.gradient_sum import GradientSum


@dataclass(frozen=True)
class Bucket:
    """flat: fp32 buffer, the gradient sums of `parameters` in their order, followed by padding."""

    parameters: Sequence[nn.Parameter]
    flat: Tensor

    def sums(self) -> list[Tensor]:
        """Views of `flat`, one per parameter, of the parameter's shape."""
        sizes = [parameter.numel() for parameter in self.parameters]
        views = self.flat.narrow(0, 0, sum(sizes)).split(sizes)
        return [view.view(parameter.shape) for view, parameter in zip(views, self.parameters, strict=True)]


class GradientAccumulator:
    """Sums over microbatches, and at the end over `axis`, of the gradients of every bucket's parameters.

    Operators with fused accumulation add to `parameter.gradient_sum` themselves (precision/gradient_sum.py); a hook of
    this class adds the gradients that autograd writes to `parameter.grad`.

    partitioned: after the reduction only the nth of axis.size equal parts of every buffer is valid on rank n; else the
    whole buffer is valid on every rank.
    """

    def __init__(self, buckets: Sequence[Bucket], axis: Axis, *, partitioned: bool = False):
        self.axis = axis
        self.partitioned = partitioned
        self.buckets = list(buckets)
        self.sums: list[GradientSum] = []
        self._missing: list[int] = []  # per bucket: gradients still to come; only during the last microbatch's backward
        self._works: list[dist.Work] = []
        for index, bucket in enumerate(self.buckets):
            for parameter, view in zip(bucket.parameters, bucket.sums(), strict=True):
                parameter.gradient_sum = GradientSum(view)
                self.sums.append(parameter.gradient_sum)
                parameter.register_post_accumulate_grad_hook(_GradientHook(self, index))
        if self.reduces:
            # NCCL creates a group's communicator at its first collective, which must not happen during graph capture.
            for work in self._reduce(self.buckets[0].flat.new_zeros(axis.size)):
                work.wait()

    @property
    def reduces(self) -> bool:
        """Whether there is a reduction: axis.size > 1."""
        return self.axis.size > 1

    @property
    def empty(self) -> tuple[bool, ...]:
        """Whether each sum is empty. The first addition overwrites (=) and later ones accumulate (+=), so a CUDA graph
        of a microbatch is valid only for the same tuple."""
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
        """After the last microbatch: zero the sums without a gradient; the next step's first addition overwrites."""
        for sum in self.sums:
            sum.begun()
            sum.empty = True

    def _finish_reductions(self) -> None:
        """Start the reduction of buckets in which a parameter got no gradient, then wait for all reductions."""
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
            parameter.gradient_sum.begun()  # zeroed if no gradient was added
        with on_side_stream(bucket.flat):  # after the side stream's weight-gradient products
            self._works += self._reduce(bucket.flat)

    def _reduce(self, flat: Tensor) -> list[dist.Work]:
        group = self.axis.group
        if not self.partitioned:
            return [dist.all_reduce(flat, group=group, async_op=True)]
        parts = flat.chunk(self.axis.size)
        if flat.is_cuda:
            return [dist.reduce_scatter_tensor(parts[self.axis.rank], flat, group=group, async_op=True)]
        # Gloo's reduce_scatter holds a copy of `flat` until its wait(); one reduce per part needs no copy.
        return [dist.reduce(part, group=group, group_dst=rank, async_op=True) for rank, part in enumerate(parts)]


class _GradientHook:
    """Post-accumulate-grad hook, called once a microbatch after autograd or a fused operator has made the gradient.

    Holds a weak reference to the accumulator: parameters keep their hooks, and must not keep the sums alive.
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


def split_into_buckets(
    parameters: Sequence[nn.Parameter], elements: int, follow: Collection[nn.Parameter] = ()
) -> list[list[nn.Parameter]]:
    """Cut `parameters` (in the model's order) into contiguous runs of at least `elements` elements, the last run first:
    the order in which the backward pass computes gradients. The run with the first parameters may be shorter. follow:
    parameters that no cut separates from the one before them."""
    found, members, count = [], [], 0
    for parameter in reversed(parameters):
        members.insert(0, parameter)
        count += parameter.numel()
        if count >= elements and parameter not in follow:
            found.append(members)
            members, count = [], 0
    return [*found, members] if members else found
