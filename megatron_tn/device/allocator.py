"""Settings of the CUDA caching allocator."""

import os

import torch


def use_expandable_segments() -> None:
    """Set expandable_segments:True, which reduces fragmentation (memory saved: docs/memory.md). Call before the first
    allocation. PYTORCH_ALLOC_CONF or PYTORCH_CUDA_ALLOC_CONF in the environment has precedence."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def return_cached_segments(device: torch.device) -> None:
    """Release the allocator's cached segments to the device, and reset its peak statistics."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
