"""The settings `engine.*`: sharding of gradients, masters and moments; precision, recomputation, compilation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator
from pydantic.dataclasses import dataclass

from megatron_tn.config.bounds import Positive
from megatron_tn.config.mapping import STRICT


@dataclass(frozen=True, config=STRICT)
class EngineConfig:
    """DeepSpeed ZeRO 0 to 3, FSDP2, or the local engine, which shards nothing."""

    name: Literal["deepspeed", "fsdp2", "local"] = "deepspeed"
    zero_stage: Literal[0, 1, 2, 3] = 1  # of name=deepspeed
    precision: Literal["bf16", "fp32"] = "bf16"  # of parameters and activations; masters and moments are always fp32
    gradient_dtype: Literal["fp32", "bf16"] = "fp32"  # in which microbatches' gradients are summed and reduced
    # Gradients reduced in one collective, in elements. ZeRO 3 and FSDP2 reduce block by block instead.
    reduce_bucket_elements: Positive = 50_000_000
    reshard_after_forward: bool = True  # fsdp2: free a block's gathered weights between its forward and backward pass
    recompute: Literal["none", "selective", "full"] = "none"  # activations recomputed in the backward pass
    recompute_every: Positive = 1  # n: recompute in blocks 0, n, 2n, ...
    # Blocks compiled by inductor; cuda_graphs also replays each as a CUDA graph.
    compile: Literal["none", "blocks", "cuda_graphs"] = "none"
    # local and zero1: capture a microbatch's forward and backward pass as one CUDA graph, and replay it.
    cuda_graph: bool = False
    # deepspeed: settings of DeepSpeed's own, laid over ours. Given as a path, the JSON file is read once, and its
    # content becomes part of the run's config. Keys that other settings decide must agree with those.
    deepspeed_config: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def sums_own_gradients(self) -> bool:
        """Whether gradients/accumulator.py sums gradients over microbatches and ranks in fp32; else FSDP2 or DeepSpeed
        does."""
        if self.name == "deepspeed":
            return (self.zero_stage, self.precision, self.gradient_dtype) == (1, "bf16", "fp32")
        return self.name == "local"

    @field_validator("deepspeed_config", mode="before")
    @classmethod
    def _read_deepspeed_config(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if not value:
            return {}
        try:
            return json.loads(Path(value).read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{value!r} is not a JSON file that can be read: {error}") from None
