"""What a plan runs the model's own code on: a world of one process that says it is many, and tensors without storage
that say they are on a GPU."""

from __future__ import annotations

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


@contextlib.contextmanager
def stand_in_world(parallel: ParallelConfig) -> Iterator[ParallelContext]:
    """The layout of the rank that needs most memory, in a world of tp x cp processes of which no other exists: the
    collectives of torch's "fake" backend return at once and leave their tensors as they are.

    Raises:
        ValueError: this process has joined a world already.
    """
    last_slice = (parallel.cp - 1) * parallel.tp  # of a sequence: the longest
    dist.init_process_group("fake", store=FakeStore(), rank=last_slice, world_size=parallel.tp * parallel.cp)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer names of collectives, which PyTorch 2.11 lacks
            yield ParallelContext.create(parallel.tp, parallel.cp, sequence_parallel=parallel.sequence_parallel)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def stand_in_tensors(device: str, **options: bool) -> Iterator[FakeTensorMode]:
    """FakeTensorMode(**options). With device="cuda" its tensors answer is_cuda=True, so that operators choose as on a
    GPU. Their device is "cpu" all the same: autograd of a PyTorch that was built without CUDA has no other."""
    dispatch = logging.getLogger("kernels.dispatch")
    quiet, dispatch.disabled = dispatch.disabled, True  # which kernels a plan chooses is no news
    if device == "cuda":
        FakeTensor.is_cuda = True  # in front of the property of torch.Tensor
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
