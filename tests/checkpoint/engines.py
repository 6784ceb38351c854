"""An engine of any kind and layout, a step of it, a checkpoint after two, and what is read and stored."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

from megatron_tn.checkpoint.load import Reader
from megatron_tn.checkpoint.manifest import CheckpointManifest, Piece
from megatron_tn.config import EngineConfig, ModelConfig, ParallelConfig, to_mapping
from megatron_tn.engine.build import build_engine, initialize_engine
from megatron_tn.training.step import train_step
from tests.engine.test_parity import RMSNORM
from tests.helpers.checkpoints import save_checkpoint
from tests.helpers.models import Rows, random_batch, tiny_config
from tests.helpers.ranks import layout

CPU = torch.device("cpu")


def make_engine(
    tp: int, engine: EngineConfig, model: ModelConfig = RMSNORM, cp: int = 1, sequence_parallel: bool = False
):
    context = layout(tp, cp, sequence_parallel)
    parallel = ParallelConfig(tp=tp, cp=cp, sequence_parallel=sequence_parallel)
    config = tiny_config(model=model, engine=engine, parallel=parallel)
    return config, build_engine(config, context, CPU)


def one_step(engine, seed: int) -> float:
    """One step on the same four rows, however many ranks share them."""
    dp = engine.context.dp
    tokens, targets = random_batch(4, 23, RMSNORM, seed=seed)
    share = 4 // dp.size
    mine = slice(dp.rank * share, (dp.rank + 1) * share)
    return train_step(engine, [Rows(tokens[mine], targets[mine])], 1e-2, CPU).loss


def save_after_two_steps(
    folder: Path, tp: int, engine_config: EngineConfig, cp: int = 1, shared: bool = False, model: ModelConfig = RMSNORM
) -> float:
    """Save at step 2; return the loss of the step after it. shared: sequence parallel."""
    config, engine = make_engine(tp, engine_config, model, cp, shared)
    initialize_engine(engine, seed=5)
    for seed in range(2):
        one_step(engine, seed)
    options = {"config": to_mapping(config), "training": {"step": 2, "tokens": 1}}
    save_checkpoint(engine, folder, step=2, optimizer_step=2, **options)
    return one_step(engine, seed=2)


@contextlib.contextmanager
def reads() -> Iterator[list[int]]:
    """Bytes of each read of a file, in any thread of this process."""
    real, counts = os.preadv, []

    def read(descriptor, buffers, at):
        counts.append(real(descriptor, buffers, at))
        return counts[-1]

    with mock.patch.object(os, "preadv", read):
        yield counts


def logical(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every kind/NAME of a checkpoint as one whole tensor."""
    manifest = CheckpointManifest.read(checkpoint)
    found = {}
    with Reader(checkpoint, manifest) as reader:
        for key in manifest.pieces:
            kind, _, name = key.partition("/")
            shape = tuple(manifest.shapes[name])
            whole = torch.empty(shape)
            box = tuple((0, length) for length in shape)
            reader.fill(kind, name, shape, Piece(box, 0, whole.numel()), whole.view(-1))
            found[key] = whole
    return found
