"""ZeRO 3's reduction of gradients: one reduce-scatter a block, straight to where this rank sums its part.

DeepSpeed's own reduction copies each gradient into a bucket, widens it, sorts the parts by rank, divides them and
copies what comes back: about 25 bytes an element moved, where this moves 6. Its host also waits when three buckets are
in flight, so that at a block's end the GPU has nothing but a reduction to do.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_tn.device.streams import on_stream_after


class BlockReduction:
    """Reduces gradients to sums over ranks as soon as the backward pass has made those of a whole block.

    parts: parameter -> this rank's part of its gradient sum, flat, a view of `sums`; the last rank's may be padded.
    sums: every part side by side.
    group: the ranks that gradients are summed over; rank n owns the nth part of every parameter.
    stream: the CUDA stream of reductions, None on a CPU.
    block_of: parameter -> its block; None for a parameter outside blocks, which is reduced alone.
    first_microbatch: whether the sums hold nothing of this step yet.
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
        self.ready: list[nn.Parameter] = []  # of one block, with their gradients; blocks come one after the other

    def take(self, parameter: nn.Parameter) -> None:
        """`parameter.grad` holds this microbatch's gradient."""
        self.ready.append(parameter)
        if len(self.ready) == self.in_block[self.block_of(parameter)]:
            self._reduce()

    def wait(self) -> None:
        """After the backward pass: the current stream waits for the reductions."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)

    @torch.no_grad()
    def _reduce(self) -> None:
        """Add the sum over ranks of the ready gradients to the parts."""
        parameters = sorted(self.ready, key=lambda parameter: self.parts[parameter].storage_offset())
        self.ready.clear()
        parts = [self.parts[parameter] for parameter in parameters]
        gradients = [parameter.grad.reshape(-1) for parameter in parameters]
        with on_stream_after(self.stream):
            by_rank = self.sums.new_empty(dist.get_world_size(self.group), sum(part.numel() for part in parts))
            torch._chunk_cat(gradients, 0, len(by_rank), out=by_rank)  # row r: rank r's parts, in the sums' type
            self._add(parts, by_rank)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if self.stream is not None:
                gradient.record_stream(self.stream)
            parameter.grad = None

    def _add(self, parts: list[Tensor], by_rank: Tensor) -> None:
        """parts += the sum over ranks of this rank's row of `by_rank`."""
        first = self.first_microbatch()
        lengths = [part.numel() for part in parts]
        start, length = parts[0].storage_offset(), sum(lengths)
        if parts[-1].storage_offset() + lengths[-1] == start + length:  # side by side: one part
            parts, lengths = [self.sums[start : start + length]], [length]
        in_place = first and len(parts) == 1
        received = parts[0] if in_place else by_rank.new_empty(length)
        dist.reduce_scatter_tensor(received, by_rank.view(-1), group=self.group)
        if not in_place:
            (torch._foreach_copy_ if first else torch._foreach_add_)(parts, received.split(lengths))
