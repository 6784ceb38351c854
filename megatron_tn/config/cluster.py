"""The settings `cluster.*`: the hardware by its datasheet, which plans and utilisation figures are held against."""

import dataclasses
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
    name: str = "local"  # name of the cluster in reports
    gpus_per_node: Count = 0  # GPUs of one node; 0: not known
    gpu_memory_gib: Unlimited = 0.0  # memory of one GPU in GiB, as CUDA reports it; 0: not known
    # GiB of GPU memory outside PyTorch's allocator that a plan adds: CUDA context, kernel code, NCCL buffers.
    outside_allocator_gib: Unlimited = 1.5
    bf16_tflops: Rate = None  # dense bf16 peak of one GPU, TFLOP/s; null: the datasheet's, by the GPU's name
    fp8_tflops: Rate = None  # dense fp8 peak of one GPU, TFLOP/s; null: not known, or a GPU without fp8 products
    memory_bandwidth_gbs: Rate = None  # GB/s of a GPU's memory; null: not known
    interconnect_gbs: Rate = None  # GB/s between nodes, per GPU and direction; null: not known
    # GB/s that a collective sustains between the GPUs of a node, per GPU and direction; null: not known.
    nvlink_gbs: Rate = None
    latency_us: Unlimited = 0.0  # microseconds that a collective takes however few bytes it moves
    # Rates that bf16 matrix products sustain: pairs [smallest dimension, TFLOP/s], rising; [] not known.
    matrix_rates: list[list[float]] = dataclasses.field(default_factory=list)
    storage_gbs: Rate = None  # GB/s that a node writes to the checkpoints' file system; null: not known

    def peak_tflops(self, device_name: str | None) -> float | None:
        """The denominator of utilisation: bf16_tflops, else the datasheet's of the GPU that CUDA calls `device_name`;
        None where neither is known, and without a GPU."""
        if self.bf16_tflops or device_name is None:
            return self.bf16_tflops
        fitting = (peak for words, peak in DATASHEET_BF16_TFLOPS if all(word in device_name for word in words))
        return next(fitting, None)
