"""The batch that a plan takes where none is named."""

from dataclasses import replace

from megatron_tn.config import TrainConfig
from megatron_tn.model.registry import parameter_count

# Parameters up to -> tokens of a batch: GPT-3's table 2.1 (arXiv 2005.14165).
BATCH_TOKENS = ((1.0e9, 0.5e6), (4e9, 1e6), (20e9, 2e6), (float("inf"), 3.2e6))
REASON = "the tokens that GPT-3 of this size had in a batch (arXiv 2005.14165, table 2.1)"

FAR = 4  # times the usual batch, or less than one over it


def is_far(config: TrainConfig) -> bool:
    """Whether the batch has more or fewer tokens than is usual for a model of this size, by more than FAR."""
    tokens = config.data.global_batch * config.data.sequence_length
    return not 1 / FAR <= tokens / usual_tokens(config) <= FAR


def usual_tokens(config: TrainConfig) -> float:
    """Tokens of a batch for a model of this size."""
    parameters = parameter_count(config.model)
    return next(tokens for most, tokens in BATCH_TOKENS if parameters <= most)


def with_usual_batch(config: TrainConfig, world_size: int) -> TrainConfig:
    """`config` with data.global_batch next to the usual tokens, in whole microbatches of every data-parallel rank."""
    ranks = config.parallel.tp * config.parallel.cp
    multiple = config.data.micro_batch * max(world_size // ranks, 1)
    microbatches = max(round(usual_tokens(config) / config.data.sequence_length / multiple), 1)
    return replace(config, data=replace(config.data, global_batch=multiple * microbatches))
