"""The settings `cluster.*`: the hardware by its datasheet, which plans and utilisation figures are held against."""

from __future__ import annotations

from typing import Annotated

from pydantic.dataclasses import dataclass

from megatron_tn.config.bounds import Bounds, Count, Unlimited
from megatron_tn.config.mapping import STRICT

Rate = Annotated[float | None, Bounds(0, above=True, below=True)]

# Words of the name that CUDA reports -> dense bf16 peak in TFLOP/s, by NVIDIA's datasheets (half of the figures "with
# sparsity"). The first row whose words are all in the name counts: PCIe and NVL boards have lower clocks than SXM.
DATASHEET_BF16_TFLOPS = (
    (("H200", "NVL"), 835.5),
    (("H200",), 989.4),
    (("H100", "PCIe"), 756.0),
    (("H100", "NVL"), 835.5),
    (("H100",), 989.4),
    (("A100",), 312.0),
)


@dataclass(frozen=True, config=STRICT)
class ClusterConfig:
    name: str = "local"  # for reports
    gpus_per_node: Count = 0  # 0: not known
    gpu_memory_gib: Unlimited = 0.0  # 0: not known
    outside_allocator_gib: Unlimited = 1.5  # allowance of a plan for CUDA's context, kernels and NCCL's buffers
    bf16_tflops: Rate = None  # dense peak of one GPU; null: by the GPU's name, where that is known
    memory_bandwidth_gbs: Rate = None  # GB/s of a GPU's memory; null: not known
    interconnect_gbs: Rate = None  # between nodes, per GPU and direction

    def peak_tflops(self, device_name: str | None) -> float | None:
        """The denominator of utilisation: bf16_tflops, else the datasheet's of the GPU that CUDA calls `device_name`;
        None where neither is known, and without a GPU."""
        if self.bf16_tflops or device_name is None:
            return self.bf16_tflops
        fitting = (peak for words, peak in DATASHEET_BF16_TFLOPS if all(word in device_name for word in words))
        return next(fitting, None)
