"""Times training steps, and samples the rate of a matrix product in between: utilisation compares both under the same
GPU clocks."""

import gc
import statistics
from collections.abc import Callable

import torch

from megatron_tn.device.matrix_rate import Marks, elapsed, matmul_tflops
from megatron_tn.planning.estimate import GIB

WARM_UP = 4  # steps: compilation ends after two, growth of the allocator after three
GROUP = 4  # most consecutive steps between two samples of the matrix rate


def sampled(step: Callable[[], Marks], count: int, device: torch.device) -> tuple[list[list[float]], float, float]:
    """(milliseconds between the marks of each of `count` steps, median matrix rate in TFLOP/s, peak GiB of the steps).

    step: runs one step and returns its marks, without waiting for the device (as in training).
    """
    for _ in range(WARM_UP):
        elapsed(step())
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elapsed(step())
    peak = peak_gib()  # before the samples' 384 MiB, which the memory pool of a CUDA graph lends to nothing else
    times, rates = [], []
    while len(times) < count:
        rates.append(matmul_tflops(device))
        left = min(GROUP, count - len(times))
        _, *group = [step() for _ in range(1 + left)]  # drop a group's first step: the device queue was idle
        times += [elapsed(marks) for marks in group]
    return times, statistics.median(rates), peak


def peak_gib() -> float:
    """Peak memory reserved by the allocator since the last reset of its statistics, in GiB; 0 on a CPU."""
    return torch.cuda.max_memory_reserved() / GIB if torch.cuda.is_available() else 0.0


def release() -> None:
    """Free the previous model's memory and compiled code."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
