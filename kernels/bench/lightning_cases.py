"""Gated linear attention under measurement: the mixer between its projections, with lightning attention within."""

from collections.abc import Iterator

import torch
from torch import Tensor

import kernels
from kernels.bench.cases import Case


def cases(device: torch.device) -> Iterator[tuple[Case, Case]]:
    """Pairs of a case small enough to be judged in fp64 and the case to time, as kernels/bench/cases.py has them."""
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    heads, width = (32, 128) if gpu else (4, 32)
    for length in (1024, 32768) if gpu else (256,):
        batch = max(32768 // length, 1) if gpu else 4
        for with_lrpe in (False, True):
            shape = (heads, width, with_lrpe, dtype, device)
            yield _mixer(1, 321, *shape), _mixer(batch, length, *shape)


def _mixer(
    batch: int, length: int, heads: int, width: int, with_lrpe: bool, dtype: torch.dtype, device: torch.device
) -> Case:
    """Counted as one kernel: qkvu read and y written, then qkvu and dy read and dqkvu written. theta's own gradient is
    judged by the self-check, whose bound for it is its own."""
    decay = torch.logspace(-8, 0, heads, base=2, device=device)
    theta = (10000.0 ** (-torch.arange(heads * width, device=device) / (heads * width))).view(heads, 1, width)
    theta.requires_grad_()

    def function(qkvu: Tensor) -> Tensor:
        return kernels.gla(qkvu, decay, theta if with_lrpe else None, act="silu")[0]

    qkvu = torch.randn(batch, length, 4 * heads * width, dtype=dtype, device=device).requires_grad_()
    dy = torch.randn(batch, length, heads * width, dtype=dtype, device=device)
    return Case(
        f"gla{' with LRPE' if with_lrpe else ''} B {batch} N {length} H {heads} d {width}",
        function,
        [qkvu],
        [dy],
        function,
    )
