"""Gradients summed over data-parallel ranks while the backward pass goes on.

The backward pass completes gradients from the last layer to the first, so what is there can cross ranks while earlier
layers' are made (PyTorch's DDP, arXiv 2006.15704, section 3.2.3). The sums of a bucket of parameters lie in one flat
buffer, reduced in place as soon as all of them are complete. Where a rank updates a part of every bucket alone (ZeRO,
arXiv 1910.02054, section 5.1) it is sent the sums of that part alone: half the traffic.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_tn.parallel.beside import beside
from megatron_tn.parallel.context import Axis


class OverlappedReduction:
    """Sums over an axis of what `main_gradient.attach` had parameters' gradients added to, bucket by bucket.

    buckets: parameters, and the flat buffer in which each one's `main_gradient.sum` lies.
    partitioned: rank n is to have the nth of axis.size equal parts of every buffer, and of the others nothing of use;
    else every rank is to have all.
    """

    def __init__(
        self, buckets: Sequence[tuple[Sequence[nn.Parameter], Tensor]], axis: Axis, *, partitioned: bool = False
    ):
        self.axis = axis
        self.partitioned = partitioned
        self.buckets = list(buckets) if axis.size > 1 else []
        self.missing: list[int] = []  # parameters that each bucket waits for, in a pass that completes them
        self.works: list[dist.Work] = []
        for index, (parameters, _) in enumerate(self.buckets):
            for parameter in parameters:
                # After the hook by which the sum takes what autograd hands over, which `attach` registered.
                parameter.register_post_accumulate_grad_hook(_Completion(self, index))
        if self.buckets:
            # The first collective of a group makes its communicator, which a CUDA graph cannot capture.
            for work in self._reduce(self.buckets[0][1].new_zeros(axis.size)):
                work.wait()

    def begin(self) -> None:
        """The backward pass that follows is the last to add to the sums."""
        self.missing = [len(parameters) for parameters, _ in self.buckets]

    def wait(self) -> None:
        """What comes after this on the current stream finds every sum reduced, also where there was no gradient."""
        for index, count in enumerate(self.missing):
            if count:
                self._start(index)
        self.missing = []
        for work in self.works:
            work.wait()
        self.works.clear()

    def completed(self, index: int) -> None:
        """A parameter of that bucket has its gradient."""
        if not self.missing:
            return
        self.missing[index] -= 1
        if not self.missing[index]:
            self._start(index)

    @torch.no_grad()
    def _start(self, index: int) -> None:
        parameters, flat = self.buckets[index]
        for parameter in parameters:
            parameter.main_gradient.begun()  # nothing may have been added to it
        with beside(flat):  # after the products that made the sums
            self.works += self._reduce(flat)

    def _reduce(self, flat: Tensor) -> list[dist.Work]:
        group = self.axis.group
        if not self.partitioned:
            return [dist.all_reduce(flat, group=group, async_op=True)]
        parts = flat.chunk(self.axis.size)
        if flat.is_cuda:
            return [dist.reduce_scatter_tensor(parts[self.axis.rank], flat, group=group, async_op=True)]
        # Gloo would keep a copy of `flat` until it is waited for.
        return [dist.reduce(part, group=group, group_dst=rank, async_op=True) for rank, part in enumerate(parts)]


class _Completion:
    """A parameter's hook. It keeps neither the sums nor, in a circle, the parameters alive."""

    def __init__(self, reduction: OverlappedReduction, index: int):
        self.reduction, self.index = weakref.ref(reduction), index

    def __call__(self, parameter: nn.Parameter) -> None:
        if (reduction := self.reduction()) is not None:
            reduction.completed(self.index)


def buckets(parameters: Sequence[nn.Parameter], elements: int) -> list[list[nn.Parameter]]:
    """`parameters`, in the model's order, cut into stretches of at least as many elements: from the last to the first,
    as gradients come. What is left over is the first ones'."""
    found, members, count = [], [], 0
    for parameter in reversed(parameters):
        members.insert(0, parameter)
        count += parameter.numel()
        if count >= elements:
            found.append(members)
            members, count = [], 0
    return [*found, members] if members else found
