"""Data that one rank of a tensor- or context-parallel group cannot read is padding on all ranks of the group."""

import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from data_pipeline.shards.index import OFFSET, TOKENS
from data_pipeline.shards.reading import shard_index
from data_pipeline.stream import BatchLoader, Manifest, StreamState, TokenStream, build_stream
from megatron_tn.config import ParallelConfig
from megatron_tn.engine.build import build_engine, initialize_engine
from megatron_tn.training.step import StepReport, train_step
from tests.data_pipeline.shard_factory import make_shards
from tests.helpers.models import TINY, tiny_config
from tests.helpers.ranks import layout, run_shared

CPU, STEPS = torch.device("cpu"), 2


def break_one(manifest: Manifest) -> None:
    """Overwrites the first document of every other shard with ids that no vocabulary has."""
    for shard in manifest.shards[::2]:
        row = shard_index(manifest, shard)[0]
        with (manifest.directory / shard.name).open("r+b") as file:
            file.seek(row[OFFSET])
            file.write(np.full(row[TOKENS], 65535, np.uint16).tobytes())


def break_all(manifest: Manifest) -> None:
    for shard in manifest.shards:
        os.truncate(manifest.directory / shard.name, 0)


DAMAGE = {"some": break_one, "all": break_all}
TP, CP = (2, 1), (1, 2)  # tp, cp
CASES = [  # layout, damage, whether documents are isolated
    (TP, "some", True),
    (TP, "all", False),
    (CP, "some", False),
    (CP, "some", True),
    (CP, "all", True),
]


def make_stream(folder: Path, isolate: bool) -> TokenStream:
    manifest = Manifest.load(folder / "manifest.json")
    return build_stream(manifest, sequence_length=24, seed=1, isolate_documents=isolate)


def train(stream: TokenStream, tp: int, cp: int) -> list[StepReport]:
    config = dataclasses.replace(tiny_config(), parallel=ParallelConfig(tp=tp, cp=cp))
    engine = build_engine(config, layout(tp, cp), CPU)
    initialize_engine(engine, 3)
    with BatchLoader(stream, lambda step: (4 * step, 4) if step < STEPS else None, micro_batch=2) as steps:
        return [train_step(engine, microbatches, 1e-2, CPU) for microbatches in steps]


def train_with_one_blind_rank(folder: Path) -> list[tuple[list[StepReport], str]]:
    """Of each case: the steps' reports, and the ledger of all ranks as a checkpoint keeps it."""
    found = []
    for (tp, cp), damage, isolate in CASES:
        own = folder / f"{tp}-{damage}-{isolate}-{dist.get_rank()}"
        shutil.copytree(folder / "shards", own)
        stream = make_stream(own, isolate)
        if dist.get_rank() == 1:
            DAMAGE[damage](stream.manifest)
        reports = train(stream, tp, cp)
        states = [None, None]
        dist.all_gather_object(states, stream.state(4 * STEPS))
        found.append((reports, StreamState.merge(states).to_json()))
    return found


def test_a_blind_rank_trains_on_what_the_others_do(tmp_path):
    """Under tp 2 and under cp 2, for some samples and for all, with documents isolated and without."""
    make_shards(tmp_path / "shards", documents=80, vocab_size=TINY.vocab_size)
    for (_, damage, isolate), (found, ledger), (other, _) in zip(
        CASES, *run_shared(2, train_with_one_blind_rank, tmp_path), strict=True
    ):
        repaired = make_stream(tmp_path / "shards", isolate)
        repaired.restore(StreamState.from_json(ledger))
        lost = [index for index in range(4 * STEPS) if index in repaired.ledger]
        assert 0 < len(lost) < 4 * STEPS if damage == "some" else len(lost) == 4 * STEPS
        expected = train(repaired, 1, 1)
        for mine, yours, wanted in zip(found, other, expected, strict=True):
            assert mine.tokens == yours.tokens == wanted.tokens
            assert mine.skipped == yours.skipped == wanted.skipped == (damage == "all")
            assert yours.loss == pytest.approx(mine.loss, rel=0, abs=0, nan_ok=True)
            assert mine.loss == pytest.approx(wanted.loss, rel=1e-5, nan_ok=True)
            assert mine.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-5, nan_ok=True)
