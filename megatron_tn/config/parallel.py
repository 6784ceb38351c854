"""The settings `parallel.*`: tensor, context and sequence parallelism."""

from pydantic.dataclasses import dataclass

from megatron_tn.config.bounds import Positive
from megatron_tn.config.mapping import STRICT


@dataclass(frozen=True, config=STRICT)
class ParallelConfig:
    """World size = dp x cp x tp; the data-parallel size dp follows from the other three."""

    # Tensor-parallel size: splits attention heads, SGLU's width and the vocabulary over tp ranks; 1: no split.
    tp: Positive = 1
    cp: Positive = 1  # context-parallel size: splits each sequence into cp contiguous slices; 1: no split
    # true: Megatron's sequence parallelism (arXiv 2205.05198): outside the split layers each tensor-parallel rank holds
    # 1/tp of the tokens. false: every rank computes norms and residual sums of all tokens.
    sequence_parallel: bool = False
