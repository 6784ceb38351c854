"""The settings `cluster.*`: the hardware by its datasheet, which plans and utilisation figures are held against."""

from __future__ import annotations

from typing import Annotated

from pydantic.dataclasses import dataclass

from megatron_tn.config.bounds import Bounds, Count, Unlimited
from megatron_tn.config.mapping import STRICT

Rate = Annotated[float | None, Bounds(0, above=True, below=True)]


@dataclass(frozen=True, config=STRICT)
class ClusterConfig:
    name: str = "local"
    gpus_per_node: Count = 0  # 0: not known
    gpu_memory_gib: Unlimited = 0.0  # 0: not known
    outside_allocator_gib: Unlimited = 1.5  # allowance of a plan for CUDA's context, kernels and NCCL's buffers
    bf16_tflops: Rate = None  # dense peak of one GPU
    memory_bandwidth_gbs: Rate = None
    interconnect_gbs: Rate = None  # between nodes, per GPU and direction
