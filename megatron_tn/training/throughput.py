"""Throughput as figures that say what they were divided by."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """flops_per_token: of forward and backward, by the model's formula, which counts nothing twice that recomputation
    does again. processes: among which they are shared. peak_tflops: a process's datasheet rate, or None."""

    flops_per_token: int
    processes: int
    peak_tflops: float | None

    def rates(self, tokens_per_second: float) -> dict[str, float]:
        """tokens_per_second: target tokens of all processes; padding is no work done.

        Returns model_tflops, of one process, and, where the peak is known, utilisation and the peak it is a share of.
        """
        tflops = self.flops_per_token * tokens_per_second / self.processes / 1e12
        found = {"tokens_per_second": tokens_per_second, "model_tflops": tflops}
        if self.peak_tflops:
            found |= {"utilisation": tflops / self.peak_tflops, "peak_tflops": self.peak_tflops}
        return found
