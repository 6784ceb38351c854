"""Which precision sums are kept in."""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of sums, statistics and carried states for inputs of `dtype`: fp64 for fp64, fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32
