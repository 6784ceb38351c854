"""Settings of the CUDA caching allocator."""

from __future__ import annotations

import os

import torch


def use_expandable_segments() -> None:
    """Have the allocator extend its segments instead of opening new ones, whose remainders fit no later request
    (docs/memory.md has the memory saved). Call before the first allocation. A setting in the environment wins."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def return_cached_segments(device: torch.device) -> None:
    """Give cached segments back to the device and begin the peak statistics anew."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
