"""The floating type of sums, statistics and states."""

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

Function = TypeVar("Function", bound=Callable)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of sums, statistics and states for inputs of `dtype`: fp64 for fp64, fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_own_types(function: Function) -> Function:
    """`function` with torch.autocast disabled, because autocast also acts inside registered operators and would cast
    their fp32 products and states to bf16. The first argument is a tensor, or a tuple that begins with one."""

    @functools.wraps(function)
    def wrapped(x, *args, **kwargs):
        device = (x[0] if isinstance(x, tuple) else x).device.type
        if not torch.is_autocast_enabled(device):
            return function(x, *args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(x, *args, **kwargs)

    return wrapped


product = in_own_types(torch.mm)
dot = in_own_types(torch.linalg.vecdot)
