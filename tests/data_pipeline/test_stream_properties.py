"""Order, isolation, skips and damage, over corpora, filters, mixtures, topologies and stops drawn from a seed."""

import itertools

import numpy as np
import pytest
import torch

from data_pipeline.shards import Manifest
from data_pipeline.shards.index import TOKENS
from data_pipeline.shards.reading import shard_index
from data_pipeline.shards.scores import save_scores
from data_pipeline.stream import (
    IGNORED,
    BatchLoader,
    DocumentStage,
    InputError,
    Mixture,
    ScoreFilter,
    StreamState,
    build_stream,
)
from data_pipeline.stream import count as counting
from tests.data_pipeline.shard_factory import batches_hash, make_shards

CASES = range(12)


def reversed_body(document):
    return np.concatenate([document.tokens[:1], document.tokens[-2:0:-1], document.tokens[-1:]])


class Case:
    """A corpus and what to do with it, all from one seed."""

    def __init__(self, folder, seed):
        draw = self.draw = np.random.default_rng(seed)
        sources = [{"a": 1.0}, {"a": 0.7, "b": 0.3}, {"a": 0.2, "b": 0.3, "c": 0.5}][draw.integers(3)]
        self.manifest = make_shards(
            folder,
            documents=int(draw.integers(20, 120)),
            shard_tokens=int(draw.integers(30, 900)),
            longest=int(draw.integers(4, 120)),
            seed=seed,
            sources=sources,
        )
        self.options = {
            "sequence_length": int(draw.integers(1, 70)),
            "seed": int(draw.integers(10)),
            "window": int(draw.integers(1, 6)),
            "isolate_documents": bool(draw.integers(2)),
        }
        self.filter = None
        if draw.integers(2):
            for shard in self.manifest.shards:
                save_scores(folder, shard, "s", draw.random((shard.documents, 2)))
            self.filter = ScoreFilter(scores="s", default=(float(draw.uniform(0, 0.5)), None))
            counting.count(self.manifest, self.filter)
        mixture = None
        if len(sources) > 1 and draw.integers(2):
            kind = ["epochs", "weights"][draw.integers(2)]
            mixture = Mixture(**{kind: {name: round(float(draw.uniform(0.3, 2)), 2) for name in sources}})
        stages = [DocumentStage("reversed", reversed_body)] if draw.integers(2) else []
        self.options |= {"filter": self.filter, "mixture": mixture, "document_stages": stages}

    def stream(self):
        return build_stream(self.manifest, **self.options)


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("seed", CASES, ids="seed={}".format)
def test_any_topology_stop_and_skip_gives_the_one_process_stream(tmp_path, seed):
    case = Case(tmp_path, seed)
    draw, start = case.draw, int(case.draw.integers(0, 500))
    sizes = [int(8 * draw.integers(1, 4)) for _ in range(12)]  # a batch size that changes as it likes
    starts = [start, *(start + np.cumsum(sizes)).tolist()]

    def plan(step):
        return (starts[step], sizes[step]) if step < len(sizes) else None

    skipped = sorted(int(index) for index in draw.integers(start, starts[-1], 3))
    alone = case.stream()
    alone.skip([(index, index + 1) for index in skipped])
    expected = [batches_hash([alone.batch(range(*(starts[s], starts[s + 1])))]) for s in range(len(sizes))]

    found, step, state = [], 0, None
    while step < len(sizes):
        steps = int(draw.integers(1, 6))  # until it is stopped
        size, micro = [(1, 8), (2, 4), (4, 2), (8, 1), (1, 1), (2, 2)][draw.integers(6)]
        streams = [case.stream() for _ in range(size)]
        for stream in streams:
            if state is None:
                stream.skip([(index, index + 1) for index in skipped])
            else:
                assert stream.restore(StreamState.from_json(state)) == starts[step]
        # Processes are slow to start: one rank of some topologies has them, which is enough to see a difference.
        workers = [int(draw.integers(1, 3)) if rank == 0 and seed % 8 == 0 else 0 for rank in range(size)]
        loaders = [
            BatchLoader(stream, plan, rank=rank, size=size, micro_batch=micro, workers=workers[rank], step=step)
            for rank, stream in enumerate(streams)
        ]
        for shares in itertools.islice(zip(*loaders, strict=True), steps):
            found.append(batches_hash(itertools.chain(*shares)))
            step += 1
        for loader in loaders:
            loader.close()
        state = StreamState.merge(stream.state(starts[step]) for stream in streams).to_json()
    assert found == expected
    assert alone.damaged == 0


@pytest.mark.parametrize("seed", CASES, ids="seed={}".format)
def test_an_epoch_feeds_each_kept_token_as_often_as_it_should(tmp_path, seed):
    case = Case(tmp_path, seed)
    stream = case.stream()
    kept_documents = kept_tokens = 0
    for number, shard in enumerate(case.manifest.shards):
        index = shard_index(case.manifest, shard)
        if case.filter is not None:
            index = index[case.filter.kept(case.manifest.read, shard, index)[0]]
        kept_documents += len(index)
        kept_tokens += int(index[:, TOKENS].sum())
        assert stream.corpus.tokens[number] == index[:, TOKENS].sum()
    if case.options["mixture"] is not None:
        return
    targets = torch.cat([stream.sample(index).targets for index in range(stream.samples_per_epoch)])
    fed = int((targets != IGNORED).sum())
    # The first token of an epoch is nobody's target; isolated, neither is the first of any document.
    crossings = kept_documents - 1 if case.options["isolate_documents"] else 0
    assert fed == kept_tokens - 1 - crossings


def test_a_manifest_that_grew_is_another_stream_and_refused(tmp_path):
    small = make_shards(tmp_path / "a", documents=60)
    state = build_stream(small, sequence_length=16, seed=1).state(40)
    shards = list(small.shards)
    make_shards(tmp_path / "a", documents=90)  # the same documents, and more
    grown = Manifest.load(tmp_path / "a" / "manifest.json")
    assert grown.shards[: len(shards) - 1] == tuple(shards[:-1])
    with pytest.raises(InputError, match=r"shards \(also ones added later\)"):
        build_stream(grown, sequence_length=16, seed=1).restore(state)


@pytest.mark.parametrize("readers", [1, 8, 64], ids="readers={}".format)
def test_fewer_shards_than_readers_hang_nobody_and_lose_nothing(tmp_path, readers):
    manifest = make_shards(tmp_path, documents=30, shard_tokens=10**6)
    assert len(manifest.shards) == 1
    loaders = [
        BatchLoader(
            build_stream(manifest, sequence_length=7, seed=1),
            lambda step: (step * 64, 64) if step < 4 else None,
            micro_batch=1,
            rank=rank,
            size=readers,
        )
        for rank in range(readers)
    ]
    found = [batches_hash(itertools.chain(*shares)) for shares in zip(*loaders, strict=True)]
    whole = build_stream(manifest, sequence_length=7, seed=1)
    assert found == [batches_hash([whole.batch(range(s * 64, s * 64 + 64))]) for s in range(4)]
