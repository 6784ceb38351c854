"""A process group of many ranks in one process, whose collectives are local copies of the right size.

For measuring one rank's part of a larger world on one GPU: an all-gather copies this rank's part into every slot, a
reduce-scatter takes this rank's slot, an all-reduce leaves the tensor. Nothing crosses a wire.
"""

import contextlib
import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from megatron_tn.config import ParallelConfig
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.parallel.world import leave_world

BACKEND = "local_copies"


class _Done(dist._Work):
    """A finished collective: its copies are queued on the current stream."""

    def wait(self, timeout=None) -> bool:
        return True

    def get_future(self) -> Future:
        future = Future()
        future.set_result(None)
        return future


class LocalCopies(dist.ProcessGroup):
    def getBackendName(self) -> str:
        return BACKEND

    @property
    def group_name(self) -> str:
        return dist.distributed_c10d._world.pg_names[self]

    def allreduce(self, tensors: list[Tensor], options: object = None) -> dist._Work:
        return _Done()

    def _allgather_base(self, whole: Tensor, part: Tensor, options: object = None) -> dist._Work:
        # PyTorch's broadcasting kernel copies element by element: as elements of 16 bytes, where the part has such.
        fits = part.nbytes % 16 == 0 and whole.data_ptr() % 16 == 0 and part.data_ptr() % 16 == 0
        kind = torch.complex128 if fits else part.dtype
        whole, part = (x.view(-1).view(kind) for x in (whole, part))
        whole.view(self.size(), -1).copy_(part.expand(self.size(), -1))
        return _Done()

    def _reduce_scatter_base(self, part: Tensor, whole: Tensor, options: object = None) -> dist._Work:
        part.view(-1).copy_(whole.view(-1).chunk(self.size())[self.rank()])
        return _Done()

    def allreduce_coalesced(self, tensors: list[Tensor], options: object = None) -> dist._Work:
        return _Done()

    def allgather_into_tensor_coalesced(self, wholes: list[Tensor], parts: list[Tensor], options=None) -> dist._Work:
        for whole, part in zip(wholes, parts, strict=True):
            self._allgather_base(whole, part)
        return _Done()

    def reduce_scatter_tensor_coalesced(self, parts: list[Tensor], wholes: list[Tensor], options=None) -> dist._Work:
        for part, whole in zip(parts, wholes, strict=True):
            self._reduce_scatter_base(part, whole)
        return _Done()

    # Their names since PyTorch 2.13.
    all_gather_single, reduce_scatter_single = _allgather_base, _reduce_scatter_base
    all_gather_single_coalesced = allgather_into_tensor_coalesced
    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced

    def barrier(self, options: object = None) -> dist._Work:
        return _Done()


@contextlib.contextmanager
def world_of_copies(parallel: ParallelConfig) -> Iterator[ParallelContext]:
    """The ParallelContext of rank 0 of tp processes, of which only this one exists."""
    if BACKEND.upper() not in dir(dist.Backend):
        dist.Backend.register_backend(
            BACKEND, lambda store, rank, size, timeout: LocalCopies(rank, size), devices=["cpu", "cuda"]
        )
    store = dist.HashStore()
    dist.init_process_group(BACKEND, store=store, rank=0, world_size=parallel.tp)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # deprecated collectives; PyTorch 2.11 lacks the new names
            yield ParallelContext.create(parallel.tp, sequence_parallel=parallel.sequence_parallel)
    finally:
        leave_world()
