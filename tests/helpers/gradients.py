"""The gradients of one step's microbatches, of any engine and layout."""

from unittest import mock

from torch import Tensor

from megatron_tn.config import TrainConfig
from megatron_tn.engine.base import Engine
from megatron_tn.engine.build import build_engine, initialize_engine
from megatron_tn.parallel import products
from megatron_tn.parallel.context import ParallelContext
from tests.helpers.models import random_batch
from tests.helpers.ranks import this_device


def in_chunks(tokens: int | None):
    """Products over tensor-parallel ranks are cut into chunks of as few; None: as ever."""
    return mock.patch.dict(products.CHUNK_TOKENS, {} if tokens is None else {this_device().type: tokens})


def step_gradients(
    config: TrainConfig, context: ParallelContext, seed: int, chunk_tokens: int | None = None
) -> tuple[Engine, dict[str, Tensor]]:
    """An engine with the initial values of `seed` after all microbatches of `random_batch`, before its step; and the
    logical gradients, on the CPU. chunk_tokens: of `in_chunks`."""
    data, device = config.data, this_device()
    tokens, targets = (part.to(device) for part in random_batch(data.global_batch, data.sequence_length))
    engine = build_engine(config, context, device)
    initialize_engine(engine, seed)
    scale = 1 / (targets != -100).sum()
    share = data.global_batch // context.dp.size
    mine = slice(context.dp.rank * share, (context.dp.rank + 1) * share)
    microbatches = list(zip(*(part[mine].split(data.micro_batch) for part in (tokens, targets)), strict=True))
    with in_chunks(chunk_tokens):
        for index, rows in enumerate(microbatches):
            engine.forward_backward(*rows, None, scale=scale, last=index == len(microbatches) - 1)
    return engine, {name: gradient.cpu().clone() for name, gradient in engine.named_logical_gradients().items()}
