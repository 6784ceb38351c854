"""A step's report and a run's work, for tests of what follows a step."""

from megatron_tn.training.step import StepReport
from megatron_tn.training.throughput import Work

WORK = Work(flops_per_token=6_000_000_000, processes=2, peak_tflops=400.0, sampled_tflops=300.0)
REPORT = StepReport(loss=2.5, tokens=100, lr=1e-3, grad_norm=1.0, applied=True, stop=False)
