"""The rate of a plain bf16 matrix product on this device, which utilisation is held against beside the datasheet's."""

import itertools
import statistics
import time

import torch

Marks = list  # list of torch.cuda.Event; on a CPU, of milliseconds as float


def matmul_tflops(device: torch.device) -> float:
    """Sustained TFLOP/s of a bf16 product of 8192 x 8192 matrices; on a CPU of 256 x 256, only to fill a table.

    It lasts until the GPU's power limit acts (0.2 s): the first products after a pause run at clocks that the GPU
    sustains for less than 0.1 s. Takes 384 MiB, and leaves the generators of random numbers as they are.
    """
    size, settling, repeats = (8192, 60, 100) if device.type == "cuda" else (256, 1, 3)
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16, generator=generator) for _ in range(2))
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
