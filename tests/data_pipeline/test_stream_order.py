"""What a global batch holds depends on manifest, seed and step, on nothing else."""

import json

import numpy as np
import pytest
import torch

from data_pipeline.shards import read_documents
from data_pipeline.stream import (
    IGNORED,
    BatchLoader,
    InputError,
    Ledger,
    Manifest,
    StreamState,
    build_stream,
)
from tests.data_pipeline.shard_factory import PAD, batches_hash, global_hashes, make_shards

LENGTH, GLOBAL = 17, 24


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"), documents=120)


def stream(manifest, **options):
    return build_stream(manifest, **{"sequence_length": LENGTH, "seed": 3, **options})


def plan(step):
    """Global batches that grow: 24 samples a step, 48 from step 6 on."""
    return (step * GLOBAL, GLOBAL) if step < 6 else (6 * GLOBAL + (step - 6) * 2 * GLOBAL, 2 * GLOBAL)


def hashes(manifest, steps, *, size, **options):
    return global_hashes([stream(manifest) for _ in range(size)], plan, steps, **options)


def test_a_window_beyond_all_shards_mixes_all_of_them(manifest):
    """Also one that no 64-bit integer holds."""
    all_of_them, beyond = (stream(manifest, window=window) for window in (len(manifest.shards), 10**19))
    assert batches_hash([all_of_them.read(range(9))]) == batches_hash([beyond.read(range(9))])


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_any_topology_resumes_the_same_global_batches(manifest):
    expected = hashes(manifest, range(100), size=1, workers=0, micro_batch=24)
    assert len(set(expected)) == 100
    # Runs at 4 ranks with 2 workers until step 7, is saved there, and goes on elsewhere.
    assert hashes(manifest, range(7), size=4, workers=2, micro_batch=3) == expected[:7]
    state = stream(manifest).state(next_sample=plan(7)[0])
    resumed = StreamState.from_json(state.to_json())
    assert stream(manifest).restore(resumed) == plan(7)[0]
    assert hashes(manifest, range(7, 20), size=2, workers=3, micro_batch=2) == expected[7:20]
    assert hashes(manifest, range(7, 100), size=8, workers=0, micro_batch=1) == expected[7:]


def test_a_fixed_stream_keeps_its_order(tmp_path):
    """The order is part of every checkpoint: when this hash changes, ORDER_VERSION must rise."""
    order = batches_hash([stream(make_shards(tmp_path)).batch(range(200))])
    assert order == "92dae179fd70534bc22461af5b79bcd90e7654fb58457d0d325e77d3f93eb194"


def test_far_index_reads_no_earlier_sample(manifest):
    subject = stream(manifest)
    opened = []
    view = subject._view
    subject._view = lambda *place: opened.append(place) or view(*place)
    far = 10**9 * subject.samples_per_epoch + 5
    assert subject.sample(far).tokens.shape == (LENGTH,)
    assert {epoch for epoch, _ in opened} == {10**9}
    assert len(opened) <= 3


@pytest.mark.parametrize("length", [1, 2, 17, 64, 5000], ids="N={}".format)
def test_each_token_is_a_target_once_an_epoch(manifest, length):
    subject = stream(manifest, sequence_length=length)
    stored = np.concatenate([document.tokens for document in read_documents(manifest)])
    epochs = []
    for epoch in range(2):
        first = epoch * subject.samples_per_epoch
        samples = [subject.sample(first + place) for place in range(subject.samples_per_epoch)]
        targets = torch.cat([sample.targets for sample in samples])
        present = targets[targets != IGNORED].numpy()
        assert len(present) == len(stored) - 1
        missing = np.bincount(stored, minlength=5000) - np.bincount(present, minlength=5000)
        assert missing.sum() == 1  # the first token of the epoch
        assert (missing >= 0).all()
        epochs.append(torch.cat([sample.tokens for sample in samples]))
    assert length == 5000 or not torch.equal(*epochs)


def test_samples_are_the_documents_laid_end_to_end(manifest):
    """In text order, every sample continues the one before it, and whole stored documents appear."""
    subject = stream(manifest)
    order = subject._order(0)
    places = np.argsort([order.sequence(position) for position in range(order.sequences)])
    text = torch.cat([subject.sample(int(place)).tokens for place in places]).tolist()
    text = ",".join(map(str, text[: order.tokens - 1]))
    found = sum(",".join(map(str, document.tokens)) in text for document in read_documents(manifest))
    assert found >= manifest.totals.documents - 1


def test_targets_are_the_next_tokens_and_the_tail_is_padding(manifest):
    subject = stream(manifest)
    order = subject._order(0)
    for index in range(subject.samples_per_epoch):
        sample = subject.sample(index)
        real = sample.targets != IGNORED
        assert torch.equal(sample.targets[:-1][real[:-1]], sample.tokens[1:][real[:-1]])
        if order.sequence(index) == order.sequences - 1:
            remaining = (order.tokens - 1) % LENGTH or LENGTH
            assert real.sum() == remaining
            assert (sample.tokens[remaining + 1 :] == PAD).all()


def test_neighbours_in_a_batch_are_not_neighbours_in_text(manifest):
    order = stream(manifest)._order(0)
    sequences = np.array([order.sequence(position) for position in range(order.sequences)])
    assert sorted(sequences) == list(range(order.sequences))
    assert np.mean(np.diff(sequences) == 1) < 0.1


@pytest.mark.parametrize("workers", [0, 2], ids="workers={}".format)
def test_loading_leaves_the_global_random_state_alone(manifest, workers):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with BatchLoader(stream(manifest), plan, micro_batch=4, workers=workers) as loader:
        next(iter(loader))
        assert torch.equal(torch.rand(3), expected)


def test_loader_ends_with_its_plan_and_can_be_moved(manifest):
    with BatchLoader(stream(manifest), lambda step: plan(step) if step < 5 else None, micro_batch=8) as loader:
        assert len(list(loader)) == 5
        loader.step = 3
        first = next(iter(loader))
    assert [batch.indices[0] for batch in first] == [72, 80, 88]


@pytest.mark.parametrize("workers", [0, 2], ids="workers={}".format)
def test_an_error_while_reading_ahead_reaches_the_consumer(manifest, workers):
    with (
        BatchLoader(
            stream(manifest), lambda step: (0, 24 if step < 2 else 25), micro_batch=8, workers=workers
        ) as loader,
        pytest.raises(InputError, match="global batch of step 2: 25 samples are not divisible"),
    ):
        list(loader)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_batch": 5}, "24 samples are not divisible by size=1 data-parallel ranks x micro_batch=5"),
        ({"micro_batch": 4, "size": 5}, "size=5"),
        ({"micro_batch": 4, "rank": 2, "size": 2}, "rank=2"),
        ({"micro_batch": 0}, "micro_batch=0"),
        ({"micro_batch": 4, "workers": -1}, "workers=-1"),
    ],
    ids=str,
)
def test_loader_refuses_by_name(manifest, options, message):
    with pytest.raises(InputError, match=message):
        BatchLoader(stream(manifest), plan, **options)


@pytest.mark.parametrize(
    "options", [{"sequence_length": 0}, {"seed": -1}, {"window": 0}], ids=lambda o: "-".join(map(str, o.items()))
)
def test_stream_refuses_by_name(manifest, options):
    ((name, value),) = options.items()
    with pytest.raises(InputError, match=f"{name}={value}"):
        stream(manifest, **options)


@pytest.mark.parametrize(
    "options", [{"seed": 4}, {"sequence_length": 16}, {"isolate_documents": True}, {"window": 2}], ids=str
)
def test_state_of_another_stream_is_refused_naming_both(manifest, options):
    state, other = stream(manifest).state(5), stream(manifest, **options)
    with pytest.raises(InputError) as caught:
        other.restore(state)
    assert state.stream_hash in str(caught.value)
    assert other.stream_hash in str(caught.value)


def test_the_folder_is_no_part_of_the_stream(manifest, tmp_path):
    moved = Manifest.load(manifest.directory / "manifest.json")
    assert Manifest(moved.content, tmp_path).content_hash == manifest.content_hash


@pytest.mark.parametrize(
    "change", [{"next_sample": "3"}, {"extra": 1}, {"skipped": [[3, 2]]}, {"stream_hash": None}], ids=str
)
def test_a_bad_state_is_refused(manifest, change):
    record = json.loads(stream(manifest).state(5).to_json()) | change
    with pytest.raises(InputError):
        StreamState.from_json(json.dumps(record))


def test_ledger_joins_ranges_and_merges_ranks():
    ledger = Ledger([(5, 7), (1, 2), (7, 9), (20, 21)])
    assert ledger.ranges == ((1, 2), (5, 9), (20, 21))
    assert [index for index in range(25) if index in ledger] == [1, 5, 6, 7, 8, 20]
    states = [StreamState("h", 0, 30, ((1, 2),)), StreamState("h", 0, 30, ((2, 4), (9, 10)))]
    assert StreamState.merge(states).skipped == ((1, 4), (9, 10))
    with pytest.raises(InputError):
        StreamState.merge([states[0], StreamState("h", 0, 31)])
