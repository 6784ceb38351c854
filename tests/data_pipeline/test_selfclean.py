"""Scores beside shards, computed once."""

import pytest

from data_pipeline.selfclean.score import score_shards
from data_pipeline.shards.reading import read_shard
from data_pipeline.shards.scores import load_scores
from tests.data_pipeline.shard_factory import make_shards


class LengthScorer:
    """Two nats a predicted token; counts what it was asked."""

    def __init__(self, fail_after: int | None = None):
        self.asked = 0
        self.fail_after = fail_after

    def document_nats(self, documents):
        if self.fail_after is not None and self.asked >= self.fail_after:
            raise KeyboardInterrupt
        self.asked += len(documents)
        return [2.0 * (len(ids) - 1) for ids in documents]


def test_every_document_is_scored_per_token_and_per_byte(tmp_path):
    manifest = make_shards(tmp_path)
    assert score_shards(manifest, LengthScorer(), "small") == manifest.totals.documents
    for shard in manifest.shards:
        scores, _ = load_scores(lambda file: (tmp_path / file).read_bytes(), shard, "small")
        assert scores[:, 0] == pytest.approx(2.0)
        stored = list(read_shard(manifest, shard))
        expected = [2 * (len(d.tokens) - 1) / d.metadata["bytes"] for d in stored]
        assert scores[:, 1] == pytest.approx(expected, rel=1e-6)


def test_a_killed_run_goes_on_and_scores_nothing_twice(tmp_path):
    manifest = make_shards(tmp_path)
    first, second, third = LengthScorer(fail_after=20), LengthScorer(), LengthScorer()
    with pytest.raises(KeyboardInterrupt):
        score_shards(manifest, first, "small")
    score_shards(manifest, second, "small")
    assert 0 < first.asked < manifest.totals.documents
    assert first.asked + second.asked == manifest.totals.documents
    assert score_shards(manifest, third, "small") == third.asked == 0


def test_processes_share_the_shards(tmp_path):
    manifest = make_shards(tmp_path)
    scored = [score_shards(manifest, LengthScorer(), "small", rank=rank, size=3) for rank in range(3)]
    assert sum(scored) == manifest.totals.documents
    assert min(scored) > 0
