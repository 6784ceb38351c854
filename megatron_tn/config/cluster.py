"""The settings `cluster.*`: rates and sizes of the hardware, from which plans and utilisation are computed."""

import dataclasses
from typing import Annotated

from pydantic.dataclasses import dataclass

from megatron_tn.config.bounds import Bounds, Unlimited
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
    # GPUs of one node; 0: not known: plans assume one rank a node, and jobs ask for no GPUs.
    gpus_per_node: Annotated[int, Bounds(0, 1024)] = 0
    # Memory of one GPU in GiB, as CUDA reports it; 0: not known: plans do not say what fits.
    gpu_memory_gib: Unlimited = 0.0
    # GiB of GPU memory that a plan adds for CUDA context, kernel code and NCCL buffers, which PyTorch's allocator does
    # not count.
    outside_allocator_gib: Unlimited = 1.5
    # Dense bf16 peak of one GPU, TFLOP/s; null: not known: plans have no times, and utilisation uses the datasheet's
    # peak of the GPU that CUDA reports.
    bf16_tflops: Rate = None
    # Dense fp8 peak of one GPU, TFLOP/s; null: not known, or a GPU without fp8 products: plans warn of
    # engine.products=fp8, and launch.submit refuses it where cluster.bf16_tflops is known.
    fp8_tflops: Rate = None
    memory_bandwidth_gbs: Rate = None  # GB/s of a GPU's memory; null: not known: plans have no times
    interconnect_gbs: Rate = None  # GB/s between nodes, per GPU and direction; null: not known: plans have no times
    # GB/s that a collective sustains between GPUs of a node, per GPU and direction; null: not known: plans have no
    # times.
    nvlink_gbs: Rate = None
    latency_us: Unlimited = 0.0  # microseconds that a collective takes however few bytes it moves
    # Rates that bf16 matrix products sustain: pairs [smallest dimension, TFLOP/s], dimensions rising; []: not known:
    # plans have no times.
    matrix_rates: list[list[float]] = dataclasses.field(default_factory=list)
    # GB/s that a node writes to the file system of checkpoints; null: not known: plans do not say how long a save
    # takes.
    storage_gbs: Rate = None

    def peak_tflops(self, device_name: str | None) -> float | None:
        """The denominator of utilisation: bf16_tflops, else the datasheet's of the GPU that CUDA calls `device_name`;
        None where neither is known, and without a GPU."""
        if self.bf16_tflops or device_name is None:
            return self.bf16_tflops
        fitting = (peak for words, peak in DATASHEET_BF16_TFLOPS if all(word in device_name for word in words))
        return next(fitting, None)
