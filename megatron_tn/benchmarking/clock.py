"""Times training steps, and samples the rate of a matrix product in between.

Utilisation compares both under the same GPU clocks. A sample lasts until the GPU's power limit acts: the first products
after a pause run at clocks that the GPU sustains for less than 0.1 s.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable

import torch

GIB = 2**30
WARM_UP = 4  # steps: compilation ends after two, growth of the allocator after three
GROUP = 4  # consecutive steps between two samples of the matrix rate

Marks = list  # of torch.cuda.Event, or of milliseconds as float on a CPU


def sampled(step: Callable[[], Marks], count: int, device: torch.device) -> tuple[list[list[float]], float, float]:
    """(milliseconds between the marks of each of `count` steps, median matrix rate in TFLOP/s, peak memory in GiB).

    step: runs one step and returns its marks, without waiting for the device (as in training).
    """
    for _ in range(WARM_UP):
        elapsed(step())
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times, peak, rates = [], 0.0, []
    while len(times) < count:
        peak = max(peak, peak_gib())
        rates.append(matmul_tflops(device))
        _, *group = [step() for _ in range(1 + GROUP)]  # drop a group's first step: the device queue was idle
        times += [elapsed(marks) for marks in group]
    return times[:count], statistics.median(rates), max(peak, peak_gib())


def matmul_tflops(device: torch.device) -> float:
    """Sustained TFLOP/s of a bf16 product of 8192 x 8192 matrices; on a CPU of 256 x 256, only to fill the table."""
    size, settling, repeats = (8192, 60, 100) if device.type == "cuda" else (256, 1, 3)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    marks = [mark(device)]
    for _ in range(settling + repeats):
        a @ b
        marks.append(mark(device))
    return 2 * size**3 / statistics.median(elapsed(marks)[settling:]) / 1e9


def mark(device: torch.device) -> torch.cuda.Event | float:
    """A time stamp: a CUDA event recorded on the current stream, or the host's clock in ms on a CPU."""
    if device.type != "cuda":
        return 1e3 * time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed(marks: Marks) -> list[float]:
    """Milliseconds between consecutive marks; synchronises with the last mark."""
    if isinstance(marks[0], float):
        return [b - a for a, b in itertools.pairwise(marks)]
    marks[-1].synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]


def peak_gib() -> float:
    """Peak memory reserved by the allocator since the last reset of its statistics, in GiB; 0 on a CPU."""
    return torch.cuda.max_memory_reserved() / GIB if torch.cuda.is_available() else 0.0


def release() -> None:
    """Free the previous model's memory and compiled code."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
