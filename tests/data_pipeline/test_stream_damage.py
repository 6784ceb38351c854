"""Damaged data at run time: a sample that cannot be read is padding, recorded and bounded, and alone."""

import contextlib
import os
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_pipeline.stream import IGNORED, BatchLoader, DamageLimitError, Manifest, StreamState, build_stream, device
from tests.data_pipeline.shard_factory import PAD, make_shards

LENGTH = 16


@pytest.fixture
def manifest(tmp_path):
    make_shards(tmp_path, documents=80)
    return Manifest.load(tmp_path / "manifest.json")


def make_stream(manifest, **options):
    return build_stream(manifest, sequence_length=LENGTH, seed=9, **options)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def overwrite_tokens(path):
    path.write_bytes(b"\xff" * path.stat().st_size)


def lengthen(path):
    """Another shard's documents would be read at this one's places, wherever they begin."""
    path.write_bytes(path.read_bytes() + bytes(512))


@pytest.mark.parametrize("damage", [truncate, overwrite_tokens, lengthen, os.unlink], ids=lambda f: f.__name__)
@pytest.mark.parametrize("part", ["name", "index"])
def test_damage_after_the_start_becomes_padding_and_touches_nothing_else(manifest, damage, part):
    good = make_stream(manifest)
    count = good.samples_per_epoch
    expected = [good.sample(index) for index in range(count)]
    damage(manifest.directory / getattr(manifest.shards[2], part))
    subject = make_stream(manifest)
    batches = [subject.batch([index]) for index in range(count)]
    lost = {index for index in range(count) if batches[index].damaged}
    assert 0 < len(lost) < count / 2
    assert {index for index in range(count) if index in subject.ledger} == lost
    assert subject.damaged == len(lost)
    for index, batch in enumerate(batches):
        if index in lost:
            assert (batch.tokens == PAD).all()
            assert (batch.targets == IGNORED).all()
            assert manifest.shards[2].name in batch.damaged[0].reason or "index" in batch.damaged[0].reason
        else:
            assert torch.equal(batch.tokens[0], expected[index].tokens)
            assert torch.equal(batch.targets[0], expected[index].targets)


def test_an_index_whose_sums_are_right_is_not_taken_for_the_shard_s(manifest):
    shard = manifest.shards[2]
    path = manifest.directory / shard.index
    index = np.load(path)
    np.save(path, index[::-1])
    subject = make_stream(manifest)
    batch = subject.batch(range(subject.samples_per_epoch))
    assert batch.damaged
    assert {damage.reason for damage in batch.damaged} == {
        f"shard {shard.name}: index {shard.index}: its sha256 is not the manifest's"
    }


def test_an_open_file_that_is_truncated_does_not_kill_the_process(manifest):
    subject = make_stream(manifest)
    subject.batch(range(subject.samples_per_epoch))
    for shard in manifest.shards:
        os.truncate(manifest.directory / shard.name, 0)
    assert len(subject.batch(range(20)).damaged) == 20


def test_a_repair_changes_no_batch_of_a_resumed_run(manifest):
    path = manifest.directory / manifest.shards[1].name
    shutil.copy(path, path.with_suffix(".bak"))
    truncate(path)
    damaged = make_stream(manifest)
    count = damaged.samples_per_epoch
    before = damaged.batch(range(count))
    state = StreamState.from_json(damaged.state(count).to_json())
    os.replace(path.with_suffix(".bak"), path)
    repaired = make_stream(manifest)
    repaired.restore(state)
    after = repaired.batch(range(count))
    assert before.damaged
    assert not after.damaged
    assert torch.equal(before.tokens, after.tokens)
    assert torch.equal(before.targets, after.targets)
    assert repaired.state(count).skipped == state.skipped


def test_too_much_damage_is_an_error(manifest):
    truncate(manifest.directory / manifest.shards[0].name)
    subject = make_stream(manifest, max_damaged=2)
    with pytest.raises(DamageLimitError, match="max_damaged=2"):
        subject.batch(range(subject.samples_per_epoch))
    assert subject.damaged == 3


@pytest.mark.parametrize("workers", [0, 2], ids="workers={}".format)
def test_the_ledger_knows_what_was_consumed_and_not_what_was_read_ahead(manifest, workers):
    for shard in manifest.shards:
        truncate(manifest.directory / shard.name)
    subject = make_stream(manifest)
    with BatchLoader(subject, lambda step: (step * 4, 4), micro_batch=2, workers=workers, prefetch=4) as loader:
        steps = iter(loader)
        damaged = {d.index for batch in next(steps) for d in batch.damaged}
        assert {index for index in range(100) if index in subject.ledger} == damaged
        assert damaged <= set(range(4))


@pytest.mark.parametrize("workers", [0, 1], ids="workers={}".format)
def test_what_is_copied_to_a_device_ahead_is_neither_recorded_nor_reordered(manifest, workers, monkeypatch):
    """The device is pretended: see tests/training/test_gpu.py for a real one."""
    events = []
    monkeypatch.setattr(device, "_moved", lambda batch, _: events.append(("moved", batch.indices[0])) or batch)
    monkeypatch.setattr("data_pipeline.stream.loader.receive", lambda sent: sent.microbatches)
    monkeypatch.setattr("torch.cuda.set_device", lambda _: None)
    monkeypatch.setattr("torch.cuda.Stream", lambda _: SimpleNamespace(record_event=lambda: None))
    monkeypatch.setattr("torch.cuda.stream", lambda _: contextlib.nullcontext())
    for shard in manifest.shards:
        truncate(manifest.directory / shard.name)
    subject = make_stream(manifest)
    plan = lambda step: (step * 2, 2) if step < 5 else None  # noqa: E731
    settings = {"micro_batch": 2, "workers": workers, "device": torch.device("cuda"), "prefetch": 1}
    with BatchLoader(subject, plan, **settings) as steps:
        for number, (batch,) in enumerate(steps):
            assert batch.indices == (2 * number, 2 * number + 1)
            wanted = min(number + 3, 5)  # the one at hand, one that waits, and one that the thread holds
            until = time.time() + 30
            while len(events) < wanted and time.time() < until:
                time.sleep(0.01)
            assert len(events) == wanted
            assert all(index < 2 * number + 2 for first, stop in subject.ledger.ranges for index in range(first, stop))
    assert number == 4
