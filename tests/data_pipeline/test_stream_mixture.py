"""The mixture over sources: exact over an epoch, even within it, and found at once at any point."""

import itertools

import numpy as np
import pytest

from data_pipeline.stream import InputError, Mixture, StreamState, build_stream
from data_pipeline.stream.interleave import BLOCK, Interleave
from tests.data_pipeline.shard_factory import batches_hash, global_hashes, make_shards

LENGTH = 16
SOURCES = {"a": 0.5, "b": 0.3, "c": 0.2}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    categories = {"a": "books", "b": "code", "c": "code"}
    return make_shards(tmp_path_factory.mktemp("shards"), documents=300, sources=SOURCES, categories=categories)


def make_stream(manifest, mixture=None, **options):
    return build_stream(manifest, sequence_length=LENGTH, seed=5, mixture=mixture, **options)


def tokens_of(manifest, *sources):
    return sum(shard.tokens for shard in manifest.shards if shard.source in sources)


def source_shares(stream, *groups):
    """How many samples of an epoch come from each group of sources; the factory gives sources ids of their own."""
    counts = dict.fromkeys(groups, 0)
    for index in range(stream.samples_per_epoch):
        body = [token for token in stream.sample(index).tokens.tolist() if token > 3]
        sources = {sorted(SOURCES)[token % len(SOURCES)] for token in body}
        (group,) = (group for group in groups if sources <= set(group))  # a sample is packed from one group
        counts[group] += 1
    return counts


def test_epochs_are_exact_over_an_epoch_and_even_within_it(manifest):
    stream = make_stream(manifest, Mixture(epochs={"a": 0.5, "b": 2.0, "c": 1.5}))
    expected = {
        name: round(epochs * -(-(tokens_of(manifest, name) - 1) // LENGTH))
        for name, epochs in {"a": 0.5, "b": 2.0, "c": 1.5}.items()
    }
    assert stream.samples_per_epoch == sum(expected.values())
    assert source_shares(stream, "a", "b", "c") == expected


def test_weights_are_shares_of_an_epoch_as_long_as_the_corpus(manifest):
    stream = make_stream(manifest, Mixture(weights={"a": 1, "code": 3}))
    total = -(-(manifest.totals.tokens - 1) // LENGTH)
    assert source_shares(stream, "a", "bc") == {"a": round(total / 4), "bc": round(total * 3 / 4)}


def test_a_source_is_gone_through_whole_before_it_begins_again(manifest):
    """Over epochs of the mixture that are a third of the source's, nothing is fed twice or left out."""
    stream = make_stream(manifest, Mixture(epochs={"a": 1 / 3, "b": 1, "c": 0}))
    once = -(-(tokens_of(manifest, "a") - 1) // LENGTH)
    seen = []
    for index in itertools.count():
        number, place = stream._interleave.locate(index)
        if stream.groups[number].key == ("a",):
            seen.append(place)
            if len(seen) == once:
                break
    assert seen == list(range(once))
    samples = [stream._read(*divmod(place, once), 0).tokens for place in seen]
    fed = np.concatenate([sample[sample > 0] for sample in samples])
    assert tokens_of(manifest, "a") - len(fed) in (0, 1)


def test_equal_epochs_are_one_corpus_and_the_manifest_s_epochs_are_the_default(manifest, tmp_path):
    assert len(make_stream(manifest).groups) == 1
    uneven = make_shards(tmp_path, documents=300, sources=SOURCES, epochs={"a": 0.5, "b": 2.0, "c": 1.5})
    asked = make_stream(manifest, Mixture(epochs={"a": 0.5, "b": 2.0, "c": 1.5}))
    default = make_stream(uneven)
    assert batches_hash([default.batch(range(50))]) == batches_hash([asked.batch(range(50))])


def hashes(stream, steps, size, workers):
    return global_hashes([stream] * size, lambda step: (step * 24, 24), steps, micro_batch=3, workers=workers)


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_any_topology_resumes_a_mixture(manifest):
    mixture = Mixture(epochs={"a": 1.53, "code": 0.44})
    expected = hashes(make_stream(manifest, mixture), range(40), 1, 0)
    assert len(set(expected)) == 40
    state = StreamState.from_json(make_stream(manifest, mixture).state(20 * 24).to_json())
    resumed = make_stream(manifest, mixture)
    assert resumed.restore(state) == 20 * 24
    assert hashes(resumed, range(20, 40), 4, 2) == expected[20:]
    assert make_stream(manifest).stream_hash != resumed.stream_hash


def test_the_interleave_is_exact_for_any_block():
    samples = [7, 1, 50_000, 1234, BLOCK]
    interleave = Interleave(samples, seed=1)
    places = [interleave.locate(index) for index in range(interleave.total)]
    for group, count in enumerate(samples):
        assert [place for number, place in places if number == group] == list(range(count))
    # Even: no stretch of four blocks is far from its share.
    for start in range(0, interleave.total - 4 * BLOCK, 7777):
        stretch = [number for number, _ in places[start : start + 4 * BLOCK]]
        for group, count in enumerate(samples):
            assert abs(stretch.count(group) - 4 * BLOCK * count / interleave.total) < 100
    far = Interleave([10**12, 3 * 10**11], seed=1)
    assert far.locate(10**15)[1] > 10**14


def test_skipped_samples_are_padding_in_every_later_run(manifest):
    """The same list across three restarts gives the same stream."""
    plain, skipping = make_stream(manifest), make_stream(manifest)
    skipping.skip([(24, 48), (60, 61)])
    runs = [skipping]
    for _ in range(3):
        state = StreamState.from_json(runs[-1].state(10).to_json())
        runs.append(make_stream(manifest))
        runs[-1].restore(state)
    hashes = {batches_hash([run.batch(range(100))]) for run in runs}
    assert len(hashes) == 1
    for index in range(100):
        skipped = 24 <= index < 48 or index == 60
        assert bool((runs[-1].sample(index).targets == -100).all()) == skipped
        assert skipped or runs[-1].sample(index).tokens.equal(plain.sample(index).tokens)
    assert runs[-1].damaged == 0
    with pytest.raises(InputError, match=r"\[5, 5\)"):
        skipping.skip([(5, 5)])


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"epochs": {"d": 1}}, "no source or category 'd'; there are a, b, books, c, code"),
        ({"epochs": {"b": 1, "code": 1}}, "source 'b' is named by 'b' and by 'code'"),
        ({"weights": {"a": 1}}, "no weight for b, c"),
        ({"epochs": {"a": 0, "code": 0}}, "every source is left out"),
        ({"epochs": {"a": -1}}, r"epochs\.a=-1"),
        ({"epochs": {"a": True}}, r"epochs\.a=True: Input should be a valid number"),
        ({}, "either epochs or weights"),
        ({"weights": {"a": 1}, "epochs": {"a": 1}}, r"^mixture=\{.*\}: a mixture has either epochs or weights$"),
        ({"wieghts": {"a": 1}}, "wieghts"),
    ],
    ids=str,
)
def test_a_bad_mixture_is_refused_by_name(manifest, mixture, message):
    with pytest.raises(InputError, match=message):
        make_stream(manifest, Mixture.parse(mixture))
