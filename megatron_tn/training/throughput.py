"""Tokens per second as TFLOP/s per process, and as a share of the datasheet rate (MFU)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """flops_per_token: FLOPs of forward and backward pass by the model's formula, without activation recomputation.
    processes: world size. peak_tflops: datasheet rate of one process's GPU; None where unknown.
    """

    flops_per_token: int
    processes: int
    peak_tflops: float | None

    def rates(self, tokens_per_second: float) -> dict[str, float]:
        """tokens_per_second: target tokens of all processes, without padding.

        Returns model_tflops per process and, where the peak is known, the peak and the utilisation.
        """
        tflops = self.flops_per_token * tokens_per_second / self.processes / 1e12
        found = {"tokens_per_second": tokens_per_second, "model_tflops": tflops}
        if self.peak_tflops:
            found |= {"utilisation": tflops / self.peak_tflops, "peak_tflops": self.peak_tflops}
        return found
