"""Tokens per second as TFLOP/s of a process, and as a share of its datasheet rate."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """flops_per_token: of forward and backward pass by the model's formula; recomputed activations are not counted
    again. processes: that share the work. peak_tflops: the datasheet rate of one process's GPU; None where not known.
    """

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
