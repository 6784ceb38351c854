"""The settings `engine.*`: sharding of gradients, masters and moments; precision, recomputation, compilation."""

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

    # deepspeed: ZeRO of engine.zero_stage; fsdp2: PyTorch's fully_shard; local: no sharding, gradients are all-reduced.
    name: Literal["deepspeed", "fsdp2", "local"] = "deepspeed"
    # deepspeed: ZeRO stage. 0 shards nothing; 1 masters and moments; 2 gradients, too; 3 weights, too.
    zero_stage: Literal[0, 1, 2, 3] = 1
    # type of parameters and activations; masters and moments are always fp32.
    precision: Literal["bf16", "fp32"] = "bf16"
    # type of the operands of the blocks' matrix products. bf16: that of engine.precision; fp8: quantised with one scale
    # per tensor, on Hopper and later GPUs, emulated on a CPU. All other operators stay in engine.precision.
    products: Literal["bf16", "fp8"] = "bf16"
    # type of the gradient sums over microbatches and ranks; bf16 needs engine.name=deepspeed.
    gradient_dtype: Literal["fp32", "bf16"] = "fp32"
    # Gradient elements that one collective reduces over ranks; ZeRO 3 and FSDP2 reduce block by block instead.
    reduce_bucket_elements: Positive = 50_000_000
    # fsdp2: free a block's gathered weights after its forward pass and gather them again for its backward pass; false:
    # gather once, keep them in between.
    reshard_after_forward: bool = True
    # what the backward pass recomputes instead of keeping it. none: nothing; selective: norms, gates and activation
    # functions; full: whole blocks from their inputs.
    recompute: Literal["none", "selective", "full"] = "none"
    recompute_every: Positive = 1  # n: engine.recompute holds for blocks 0, n, 2n, ...; 1: for every block
    # none: eager blocks; blocks: torch.compile each block with inductor; cuda_graphs: replay each compiled block as a
    # CUDA graph, too.
    compile: Literal["none", "blocks", "cuda_graphs"] = "none"
    # true: capture forward and backward pass of a microbatch as one CUDA graph and replay it; only with engine=local or
    # engine=zero1. false: launch kernel by kernel.
    cuda_graph: bool = False
    # Keys to add to DeepSpeed's own config, or the path of a JSON file of such keys, whose content becomes part of the
    # run's config. A key that another setting determines must agree with that setting. {}: none.
    deepspeed_config: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def element_bytes(self) -> int:
        """Bytes of an element of the parameters and activations."""
        return 2 if self.precision == "bf16" else 4

    @property
    def shards_state(self) -> bool:
        """Whether masters and moments are sharded over the ranks with the same weights."""
        return self.name == "fsdp2" or (self.name == "deepspeed" and self.zero_stage > 0)

    @property
    def sums_own_gradients(self) -> bool:
        """Whether gradients/accumulator.py sums gradients over microbatches and ranks in fp32; else FSDP2 or DeepSpeed
        does."""
        if self.name == "deepspeed":
            return (self.zero_stage, self.precision, self.gradient_dtype) == (1, "bf16", "fp32")
        return self.name == "local"

    @property
    def keeps_weights(self) -> bool:
        """Whether a rank keeps its tensor-parallel part of the weights whole; else they are gathered for each block."""
        return self.name == "local" or (self.name == "deepspeed" and self.zero_stage < 3)

    @property
    def frees_weights(self) -> bool:
        """Whether the blocks' matrices are kept in fp8 and not in the computing type (engine/freed_weights.py): where
        a rank keeps its weights whole, and they are not the masters."""
        own_masters = self.precision == "fp32" and (self.name == "local" or self.zero_stage == 0)
        return self.products == "fp8" and self.keeps_weights and not own_masters

    @property
    def keeps_fp8_transposes(self) -> bool:
        """Whether weights kept in fp8 are kept in both orders, two bytes a parameter. Not with recomputation, which is
        chosen where memory is short: there each backward pass transposes them."""
        return self.recompute == "none"

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
