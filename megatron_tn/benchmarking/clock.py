"""Times of steps, and the rate of a matrix product in the same minutes.

The rate is sampled between the steps that it is held against, and for as long as a GPU's power limit takes to act: the
first products after a pause run at clocks that the GPU does not sustain for a tenth of a second.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable

import torch

GIB = 2**30
WARM_UP = 4  # steps: compilers are done after two, the allocator after three
GROUP = 4  # steps in a row between two samples of the matrix rate

Marks = list  # of torch.cuda.Event, or of milliseconds as float on a CPU


def sampled(step: Callable[[], Marks], count: int, device: torch.device) -> tuple[list[list[float]], float, float]:
    """(milliseconds between the marks of each of `count` steps, median matrix rate in TFLOP/s, peak memory in GiB).

    step: runs one step and returns its marks. As in training, the host does not wait between steps.
    """
    for _ in range(WARM_UP):
        elapsed(step())
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times, peak, rates = [], 0.0, []
    while len(times) < count:
        peak = max(peak, peak_gib())
        rates.append(matmul_tflops(device))
        _, *group = [step() for _ in range(1 + GROUP)]  # the first step of a group finds an idle queue
        times += [elapsed(marks) for marks in group]
    return times[:count], statistics.median(rates), max(peak, peak_gib())


def matmul_tflops(device: torch.device) -> float:
    """TFLOP/s that a bf16 product of 8192 x 8192 matrices sustains; on a CPU a small product, to fill the column."""
    size, settling, repeats = (8192, 60, 100) if device.type == "cuda" else (256, 1, 3)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    marks = [mark(device)]
    for _ in range(settling + repeats):
        a @ b
        marks.append(mark(device))
    return 2 * size**3 / statistics.median(elapsed(marks)[settling:]) / 1e9


def mark(device: torch.device) -> torch.cuda.Event | float:
    """This moment: on the device's queue, or of the host's clock on a CPU."""
    if device.type != "cuda":
        return 1e3 * time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed(marks: Marks) -> list[float]:
    """Milliseconds from mark to mark; waits for the device."""
    if isinstance(marks[0], float):
        return [b - a for a, b in itertools.pairwise(marks)]
    marks[-1].synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]


def peak_gib() -> float:
    """The most that the allocator has reserved since the last reset; 0 on a CPU."""
    return torch.cuda.max_memory_reserved() / GIB if torch.cuda.is_available() else 0.0


def release() -> None:
    """Free what the model before has left behind."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
