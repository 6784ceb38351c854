"""Scores beside shards, computed once; and which documents people are shown."""

import numpy as np
import pytest

from data_pipeline.audit.sampling import tails_and_borders
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


def test_people_see_both_tails_and_both_borders():
    scores = np.arange(100.0)
    scores[50] = np.nan
    chosen = tails_and_borders(scores, low=20.2, high=80.2, each=3, seed=0)
    places = {place: sorted(c.index for c in chosen if c.place == place) for place in {c.place for c in chosen}}
    assert places == {
        "low tail": [0, 1, 2],
        "low border": [19, 20, 21],
        "high border": [79, 80, 81],
        "high tail": [97, 98, 99],
    }
    assert chosen == tails_and_borders(scores, low=20.2, high=80.2, each=3, seed=0)
    assert chosen != tails_and_borders(scores, low=20.2, high=80.2, each=3, seed=1)


def test_an_open_side_has_no_border_and_nobody_is_shown_twice():
    chosen = tails_and_borders(np.array([3.0, 1.0, 2.0, np.nan]), low=None, high=2.5, each=2, seed=0)
    assert sorted(c.index for c in chosen) == [0, 1, 2]
    assert {c.place for c in chosen} == {"low tail", "high border"}
