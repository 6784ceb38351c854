"""Time and memory of a function, and the bandwidth of copies."""

import statistics
import time
from collections.abc import Callable

import torch

MIB = 2**20
REPEATS = 20
HEAD_START = 4_000_000  # GPU clock cycles of idle wait before each run, about 2 ms


def milliseconds(function: Callable[[], object], device: torch.device) -> float:
    """Median time of `function` over REPEATS runs, after three to warm up.

    On a GPU: time between two CUDA events, with a cold L2 cache. A wait of HEAD_START is queued first to hide the
    host's launch time, as in a training step, where earlier layers still run.
    """
    for _ in range(3):
        function()
    if device.type != "cuda":
        times = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)
    flush = torch.empty(256 * MIB, dtype=torch.int8, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPEATS)]
    for start, stop in events:
        flush.zero_()
        torch.cuda._sleep(HEAD_START)
        start.record()
        function()
        stop.record()
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(stop) for start, stop in events)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per millisecond of a large copy on `device`, reads plus writes."""
    size = (2048 if device.type == "cuda" else 128) * MIB
    return size / copy_milliseconds(size, device)


def copy_milliseconds(size: int, device: torch.device) -> float:
    """Time of a copy that reads size / 2 bytes and writes size / 2 bytes."""
    source = torch.ones(max(size // 2, 1), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return milliseconds(lambda: target.copy_(source), device)


def extra_memory(function: Callable[[], object], device: torch.device) -> float | None:
    """Peak MiB allocated during `function`, minus the MiB allocated before; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = function()
    peak = torch.cuda.max_memory_allocated(device)
    del result
    return (peak - before) / MIB
