"""ZeRO 3's gradient reduction: one reduce-scatter per block, directly into this rank's partition of the gradient sums.

DeepSpeed's own reduction copies each gradient into a bucket, casts it to the reduction type, sorts the partitions by
rank, divides them and copies the result: about 25 bytes of traffic an element, against 6 here. Its host also waits
when three buckets are in flight, so that at a block's end the GPU runs nothing but a reduction.
"""

import collections
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_tn.device.streams import on_stream_after


class BlockReduction:
    """Reduces a block's gradients to sums over ranks as soon as the backward pass has made all of them.

    parts: parameter -> this rank's part of its gradient sum, flat, a view of `sums`; the last rank's may be padded.
    sums: all parts of this rank, concatenated.
    group: the ranks that gradients are summed over; rank n owns the nth part of every parameter.
    stream: the CUDA stream of reductions, None on a CPU.
    block_of: parameter -> its block; None for a parameter outside the blocks, which gets a reduce-scatter of its own.
    first_microbatch: whether this is the step's first microbatch, whose gradients overwrite the sums.
    """

    def __init__(
        self,
        parts: Mapping[nn.Parameter, Tensor],
        sums: Tensor,
        group: dist.ProcessGroup,
        *,
        stream: torch.cuda.Stream | None,
        block_of: Callable[[nn.Parameter], nn.Module | None],
        first_microbatch: Callable[[], bool],
    ):
        self.parts = parts
        self.sums = sums
        self.group = group
        self.stream = stream
        self.block_of = block_of
        self.first_microbatch = first_microbatch
        self.in_block = collections.Counter(map(block_of, parts))
        self.in_block[None] = 1
        self.ready: list[nn.Parameter] = []  # parameters of the current block that have .grad

    def take(self, parameter: nn.Parameter) -> None:
        """Called when `parameter.grad` holds this microbatch's gradient; reduces the block once it is complete."""
        self.ready.append(parameter)
        if len(self.ready) == self.in_block[self.block_of(parameter)]:
            self._reduce()

    def wait(self) -> None:
        """After the backward pass: make the current stream wait for the reductions."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)

    @torch.no_grad()
    def _reduce(self) -> None:
        """Reduce-scatter the ready gradients, and add this rank's part of each to `parts`."""
        parameters = sorted(self.ready, key=lambda parameter: self.parts[parameter].storage_offset())
        self.ready.clear()
        parts = [self.parts[parameter] for parameter in parameters]
        gradients = [parameter.grad.reshape(-1) for parameter in parameters]
        with on_stream_after(self.stream):
            by_rank = self.sums.new_empty(dist.get_world_size(self.group), sum(part.numel() for part in parts))
            torch._chunk_cat(gradients, 0, len(by_rank), out=by_rank)  # row r: rank r's parts, cast to the sums' type
            self._add(parts, by_rank)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if self.stream is not None:
                gradient.record_stream(self.stream)
            parameter.grad = None

    def _add(self, parts: list[Tensor], by_rank: Tensor) -> None:
        """parts += sum over ranks of by_rank[this rank]; `=` instead of `+=` in the first microbatch."""
        first = self.first_microbatch()
        lengths = [part.numel() for part in parts]
        start, length = parts[0].storage_offset(), sum(lengths)
        if parts[-1].storage_offset() + lengths[-1] == start + length:  # contiguous in `sums`: treat as one part
            parts, lengths = [self.sums[start : start + length]], [length]
        in_place = first and len(parts) == 1
        received = parts[0] if in_place else by_rank.new_empty(length)
        dist.reduce_scatter_tensor(received, by_rank.view(-1), group=self.group)
        if not in_place:
            (torch._foreach_copy_ if first else torch._foreach_add_)(parts, received.split(lengths))
