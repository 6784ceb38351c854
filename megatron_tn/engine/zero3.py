"""ZeRO 3's gradients and update, in the place of DeepSpeed's own.

A block's gradients leave by one collective as soon as they are all there, straight to where this rank sums its part.
DeepSpeed's way lays each into a bucket, widens it, sorts the parts by rank, divides them, and copies what comes back:
about 25 bytes a parameter moved where this moves 6; and its host waits when three buckets are on their way, so that at
a block's end the device has nothing to do but reduce. Its update copies all gradients once more, and all masters.
"""

from __future__ import annotations

import collections
import contextlib

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_tn.engine.clipping import clipped_step
from megatron_tn.optim.adamw import FusedAdamW
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.parallel.gradients import gradient_norm


class PartitionedUpdate:
    """Reduces gradients and steps for `wrapper`, DeepSpeed's optimizer of stage 3, which goes on to call it.

    Gradients are summed over ranks, where DeepSpeed averages. parts: parameter -> this rank's part of its gradient,
    flat; the parts lie side by side in one tensor, in the order of DeepSpeed's groups.
    """

    def __init__(self, wrapper, context: ParallelContext, clip_norm: float):
        self.wrapper = wrapper
        self.inner = wrapper.optimizer
        self.context = context
        self.clip_norm = clip_norm
        self.group = wrapper.dp_process_group
        self.sums = wrapper.grad_partitions_flat_buffer
        self.stream = wrapper.reduce_and_partition_stream if self.sums.is_cuda else None
        parameters = [parameter for group in wrapper.fp16_groups for parameter in group]
        lengths = [parameter.partition_numel() for parameter in parameters]
        self.parts = dict(zip(parameters, self.sums.split(lengths), strict=True))
        self.in_block = collections.Counter(_block_of(parameter) for parameter in parameters)
        self.in_block[None] = 1  # outside blocks each goes alone
        self.waiting: list[nn.Parameter] = []
        self._give_masters_to_optimizer()
        wrapper.reduce_ready_partitions_and_remove_grads = self.take
        wrapper.independent_gradient_partition_epilogue = self.finish
        wrapper.step = self.step

    def _give_masters_to_optimizer(self) -> None:
        """For good; DeepSpeed lends them, one group after the other, for a step of each."""
        wrapper = self.wrapper
        self.masters = wrapper.fp32_partitioned_groups_flat
        for index, master in enumerate(self.masters):
            self.inner.param_groups[wrapper.sub_group_to_group_id[index]]["params"].append(master)
        self.copies = {  # in fp32 a part of a parameter is its own master
            master: part
            for master, part in zip(self.masters, wrapper.fp16_partitioned_groups_flat, strict=True)
            if master is not part
        }
        if isinstance(self.inner, FusedAdamW):
            self.inner.copies = self.copies

    def take(self, parameter: nn.Parameter) -> None:
        """`parameter.grad` is there, for this microbatch. Those of a block come one after the other."""
        self.waiting.append(parameter)
        if len(self.waiting) == self.in_block[_block_of(parameter)]:
            self._reduce()

    def finish(self) -> None:
        """After the backward pass."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
        self.wrapper._epilogue_ran_this_backward = True  # the next forward pass begins another microbatch

    @torch.no_grad()
    def _reduce(self) -> None:
        """Sum what waits over the ranks, each of which gets its part, in the type that gradients are summed in."""
        parameters = sorted(self.waiting, key=lambda parameter: self.parts[parameter].storage_offset())
        self.waiting.clear()
        parts = [self.parts[parameter] for parameter in parameters]
        gradients = [parameter.grad.reshape(-1) for parameter in parameters]
        with self._beside():
            by_rank = self.sums.new_empty(dist.get_world_size(self.group), sum(part.numel() for part in parts))
            torch._chunk_cat(gradients, 0, len(by_rank), out=by_rank)
            self._add(parts, by_rank)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if self.stream is not None:
                gradient.record_stream(self.stream)
            parameter.grad = None

    def _add(self, parts: list[Tensor], by_rank: Tensor) -> None:
        """Reduce `by_rank`, whose row r is rank r's, to `parts`, or add it to them."""
        first = self.wrapper.micro_step_id == 0
        lengths = [part.numel() for part in parts]
        start, length = parts[0].storage_offset(), sum(lengths)
        if parts[-1].storage_offset() + lengths[-1] == start + length:  # side by side: as one
            parts, lengths = [self.sums[start : start + length]], [length]
        straight = first and len(parts) == 1
        received = parts[0] if straight else by_rank.new_empty(length)
        dist.reduce_scatter_tensor(received, by_rank.view(-1), group=self.group)
        if not straight:
            (torch._foreach_copy_ if first else torch._foreach_add_)(parts, received.split(lengths))

    @contextlib.contextmanager
    def _beside(self):
        """On the stream of reductions, after what has been queued."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield

    @torch.no_grad()
    def step(self) -> None:
        """Clip, update the masters, and this rank's parts of the parameters from them."""
        wrapper = self.wrapper
        wrapper._pre_step()  # counts microbatches from 0 again
        wrapper._partition_all_parameters()
        sums = [(parameter.shard_spec, part) for parameter, part in self.parts.items()]
        norm = gradient_norm(sums, self.context.tp, self.sums.device, sharded_over=self.context.data)
        lengths = [master.numel() for master in self.masters]
        for master, gradient in zip(self.masters, self.sums.split(lengths), strict=True):
            master.grad = gradient.to(master.dtype)
        norm = clipped_step(self.inner, norm, self.clip_norm)
        for master in self.masters:
            master.grad = None
        wrapper._global_grad_norm, wrapper.overflow = norm, not norm < float("inf")
        if not wrapper.overflow:
            self.refresh(copied=isinstance(self.inner, FusedAdamW))

    def refresh(self, copied: bool = False) -> None:
        """The masters have changed: copies of their parts follow, unless they were `copied`, and those parameters that
        every rank keeps whole."""
        if not copied:
            for master, copy in self.copies.items():
                copy.copy_(master)
        if whole := self.wrapper.persistent_parameters:
            whole[0].all_gather(whole)
        self.wrapper.invalidate_secondary_tensor()


def _block_of(parameter: nn.Parameter) -> nn.Module | None:
    return getattr(parameter, "ds_z3_leaf_module", None)
