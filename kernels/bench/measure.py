"""Time, memory and the floor that a device's copy bandwidth sets."""

import statistics
import time
from collections.abc import Callable

import torch

MIB = 2**20
HEAD_START = 4_000_000  # clock cycles, about two milliseconds


def milliseconds(function: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """Median time of `function`, after three runs to warm up; on a GPU the device's own, between events, with a cold L2
    cache and the host's launches hidden behind a wait, as a training step hides them behind the layers before."""
    for _ in range(3):
        function()
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)
    flush = torch.empty(256 * MIB, dtype=torch.int8, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, stop in events:
        flush.zero_()
        torch.cuda._sleep(HEAD_START)
        start.record()
        function()
        stop.record()
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(stop) for start, stop in events)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a millisecond of a large copy on `device`, reads and writes both counted."""
    size = (2048 if device.type == "cuda" else 128) * MIB
    return size / copy_milliseconds(size, device)


def copy_milliseconds(size: int, device: torch.device) -> float:
    """Time of a copy that moves `size` bytes, reads and writes both counted."""
    source = torch.ones(max(size // 2, 1), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return milliseconds(lambda: target.copy_(source), device)


def extra_memory(function: Callable[[], object], device: torch.device) -> float | None:
    """MiB allocated at the peak of `function` beyond what was there before; None where it cannot be read (CPU)."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = function()
    peak = torch.cuda.max_memory_allocated(device)
    del result
    return (peak - before) / MIB
