"""The environment in which planning runs the model's code: torch's fake process group (one process of tp x cp), and
fake tensors without storage, with is_cuda=True for device="cuda"."""

import contextlib
import logging
import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore  # importing it registers the backend "fake"
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tn.config import ParallelConfig
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.parallel.world import leave_world


@contextlib.contextmanager
def stand_in_world(parallel: ParallelConfig, rank: int | None = None, size: int = 0) -> Iterator[ParallelContext]:
    """The ParallelContext of `rank` of `size` processes; by default that with the highest memory of tp x cp. Only this
    process exists: collectives of torch's "fake" backend return at once and leave tensors unchanged.

    Raises:
        ValueError: torch.distributed is already initialised in this process.
    """
    if rank is None:
        rank, size = (parallel.cp - 1) * parallel.tp, parallel.tp * parallel.cp  # the last, longest slice of a sequence
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # deprecated collectives; PyTorch 2.11 lacks the new names
            yield ParallelContext.create(parallel.tp, parallel.cp, sequence_parallel=parallel.sequence_parallel)
    finally:
        leave_world()


@contextlib.contextmanager
def stand_in_tensors(device: str, **options: bool) -> Iterator[FakeTensorMode]:
    """FakeTensorMode(**options). With device="cuda" its tensors have is_cuda=True, so that operators take their GPU
    path; their device is "cpu", since autograd of a PyTorch built without CUDA supports no other."""
    dispatch = logging.getLogger("kernels.dispatch")
    quiet, dispatch.disabled = dispatch.disabled, True  # do not log the kernels that a plan selects
    if device == "cuda":
        FakeTensor.is_cuda = True  # overrides the property of torch.Tensor
    try:
        with FakeTensorMode(**options) as mode, _WideningAddmm():
            yield mode
    finally:
        dispatch.disabled = quiet
        if device == "cuda":
            del FakeTensor.is_cuda


class _WideningAddmm(TorchDispatchMode):
    """addmm of bf16 matrices into an fp32 `out` returns `out`: FakeTensorMode of PyTorch 2.11 has no rule for it."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.aten.addmm.dtype_out:
            return kwargs["out"]
        return operator(*args, **(kwargs or {}))
