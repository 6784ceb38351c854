"""Gradients summed over data-parallel ranks while the backward pass goes on.

The backward pass completes gradients from the last layer to the first, so what is there can cross ranks while earlier
layers' are made (PyTorch's DDP, arXiv 2006.15704, section 3.2.3). Sums lie in flat buffers in the model's order; a
bucket is a stretch of one, reduced in place as soon as all its parameters are complete. Where a rank updates a part of
the parameters alone (ZeRO, arXiv 1910.02054, section 5.1) it is sent the sums of that part alone: half the traffic.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_tn.parallel.beside import beside
from megatron_tn.parallel.context import Axis


class _Bucket:
    """parameters: complete together; pieces: the stretches of the buffer to reduce then, each to a rank or to all."""

    def __init__(self, parameters: list[nn.Parameter], pieces: list[tuple[Tensor, int | None]]):
        self.parameters = parameters
        self.pieces = pieces
        self.missing = 0


class OverlappedReduction:
    """Sums over an axis of what `main_gradient.attach` had parameters' gradients added to, bucket by bucket.

    parameters: in each one's `main_gradient.sum` a part of one of `flats`, 1-D buffers, in the order that they lie in.
    elements: a bucket takes parameters until it has as many.
    partitioned: rank n is to have the nth of axis.size equal parts of every buffer, and of the others nothing of use;
    else every rank is to have all.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        flats: Sequence[Tensor],
        axis: Axis,
        elements: int,
        *,
        partitioned: bool = False,
    ):
        self.axis = axis
        self.armed = False
        self.works: list[dist.Work] = []
        self.buckets: list[_Bucket] = []
        if axis.size == 1:
            return
        bucket_of = {}
        for flat in flats:
            held = [p for p in parameters if _lies_in(p.main_gradient.sum, flat)]
            for members in _cut(held, elements):
                first, last = members[0].main_gradient.sum, members[-1].main_gradient.sum
                start = first.storage_offset() - flat.storage_offset()
                stop = last.storage_offset() + last.numel() - flat.storage_offset()
                pieces = _owned(flat, start, stop, axis.size) if partitioned else [(flat[start:stop], None)]
                self.buckets.append(_Bucket(members, pieces))
                bucket_of |= dict.fromkeys(members, self.buckets[-1])
        for parameter, bucket in bucket_of.items():
            # After the hook by which the sum takes what autograd hands over, which `attach` registered.
            parameter.register_post_accumulate_grad_hook(_Completion(self, bucket))
        # The first collective of a group makes its communicator, which a CUDA graph cannot capture.
        self._reduce(flats[0].new_zeros(1), 0 if partitioned else None).wait()

    def begin(self) -> None:
        """The backward pass that follows is the last to add to the sums."""
        self.armed = True
        for bucket in self.buckets:
            bucket.missing = len(bucket.parameters)

    def wait(self) -> None:
        """What comes after this on the current stream finds every sum reduced, also where there was no gradient."""
        self.armed = False
        for bucket in self.buckets:
            if bucket.missing:
                self._start(bucket)
        for work in self.works:
            work.wait()
        self.works.clear()

    def completed(self, bucket: _Bucket) -> None:
        """A parameter of the bucket has its gradient."""
        if not self.armed:
            return
        bucket.missing -= 1
        if not bucket.missing:
            self._start(bucket)

    @torch.no_grad()
    def _start(self, bucket: _Bucket) -> None:
        for parameter in bucket.parameters:
            parameter.main_gradient.begun()  # nothing may have been added to it
        with beside(*(piece for piece, _ in bucket.pieces)):  # after the products that made the sums
            self.works += [self._reduce(piece, owner) for piece, owner in bucket.pieces]

    def _reduce(self, piece: Tensor, owner: int | None) -> dist.Work:
        if owner is None:
            return dist.all_reduce(piece, group=self.axis.group, async_op=True)
        return dist.reduce(piece, group=self.axis.group, group_dst=owner, async_op=True)


class _Completion:
    """A parameter's hook. It keeps neither the sums nor, in a circle, the parameters alive."""

    def __init__(self, reduction: OverlappedReduction, bucket: _Bucket):
        self.reduction, self.bucket = weakref.ref(reduction), weakref.ref(bucket)

    def __call__(self, parameter: nn.Parameter) -> None:
        if (reduction := self.reduction()) is not None:
            reduction.completed(self.bucket())


def _lies_in(part: Tensor, flat: Tensor) -> bool:
    start = flat.data_ptr()
    return start <= part.data_ptr() < start + flat.numel() * flat.element_size()


def _owned(flat: Tensor, start: int, stop: int, ranks: int) -> list[tuple[Tensor, int]]:
    """flat[start:stop] cut where one rank's equal part of `flat` ends and the next one's begins."""
    part = flat.numel() // ranks
    owners = range(start // part, (stop - 1) // part + 1)
    return [(flat[max(start, owner * part) : min(stop, (owner + 1) * part)], owner) for owner in owners]


def _cut(parameters: list[nn.Parameter], elements: int) -> list[list[nn.Parameter]]:
    """From the last parameter to the first, as gradients come; what is left over is the first ones'."""
    buckets, members, count = [], [], 0
    for parameter in reversed(parameters):
        members.insert(0, parameter)
        count += parameter.numel()
        if count >= elements:
            buckets.append(members)
            members, count = [], 0
    return [*buckets, members] if members else buckets
