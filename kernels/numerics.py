"""Which precision sums and products are kept in."""

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

Function = TypeVar("Function", bound=Callable)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of sums, statistics and carried states for inputs of `dtype`: fp64 for fp64, fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_own_types(function: Function) -> Function:
    """`function`, of a tensor and more, in the types that it is given: torch.autocast, where it is on, reaches into
    operators, and would make bf16 of fp32 products and states."""

    @functools.wraps(function)
    def wrapped(x, *args, **kwargs):
        if not torch.is_autocast_enabled(x.device.type):
            return function(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **kwargs)

    return wrapped


product = in_own_types(torch.mm)
dot = in_own_types(torch.linalg.vecdot)
