"""Tokens per second as TFLOP/s per process, and as shares of the datasheet rate (MFU) and of a measured matrix rate;
and a clock that stands still while a run evaluates or saves.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field


class Clock:
    """Seconds of training alone."""

    def __init__(self) -> None:
        self._paused = 0.0

    def now(self) -> float:
        return time.perf_counter() - self._paused

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - began


@dataclass(frozen=True)
class Work:
    """flops_per_token: of forward and backward pass by the model's formula; recomputed activations are not counted
    again. processes: that share the work. peak_tflops: the datasheet rate of one process's GPU; None where not known.
    sampled_tflops: the matrix rate of rank 0's GPU, measured when the process began; None where there is no GPU. clock:
    that steps are timed with.
    """

    flops_per_token: int
    processes: int
    peak_tflops: float | None
    sampled_tflops: float | None = None
    clock: Clock = field(default_factory=Clock)

    def rates(self, tokens_per_second: float) -> dict[str, float]:
        """tokens_per_second: target tokens of all processes, without padding.

        Returns model_tflops per process and, for each of the two rates that is known, the rate and the utilisation.
        """
        tflops = self.flops_per_token * tokens_per_second / self.processes / 1e12
        found = {"tokens_per_second": tokens_per_second, "model_tflops": tflops}
        if self.peak_tflops:
            found |= {"utilisation": tflops / self.peak_tflops, "peak_tflops": self.peak_tflops}
        if self.sampled_tflops:
            found |= {"utilisation_sampled": tflops / self.sampled_tflops, "sampled_tflops": self.sampled_tflops}
        return found
