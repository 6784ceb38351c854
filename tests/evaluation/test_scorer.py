"""A model behind the self-cleaning protocol."""

import re

import numpy as np

from data_pipeline.selfclean.score import score_shards
from data_pipeline.shards.reading import read_documents
from data_pipeline.shards.scores import load_scores
from megatron_tn.evaluation.perplexity import document_nats
from megatron_tn.evaluation.progress import DocumentProgress
from megatron_tn.evaluation.scorer import ModelScorer
from tests.data_pipeline.shard_factory import make_shards
from tests.helpers.models import TINY, reference_model


def test_shards_are_scored_with_a_model(tmp_path):
    manifest = make_shards(tmp_path, documents=12, vocab_size=TINY.vocab_size)
    model = reference_model(TINY, seed=1)
    assert score_shards(manifest, ModelScorer(model), "tiny") == 12
    documents = [document.tokens for document in read_documents(manifest)]

    def read(file: str) -> bytes:
        return (tmp_path / file).read_bytes()

    scores = np.concatenate([load_scores(read, shard, "tiny")[0] for shard in manifest.shards])
    expected = [nats / (len(ids) - 1) for ids, nats in zip(documents, document_nats(model, documents), strict=True)]
    np.testing.assert_allclose(scores[:, 0], expected, rtol=1e-6)


def test_progress_has_speed_and_time_left_and_passes_over_what_is_scored(tmp_path, monkeypatch, capsys):
    manifest = make_shards(tmp_path, documents=12, vocab_size=TINY.vocab_size)
    monkeypatch.setattr("megatron_tn.evaluation.progress.LINE_EVERY_S", 0.0)
    for name in ("tiny", "tiny", "again"):
        with DocumentProgress(name, 12, manifest.totals.tokens) as shown:
            scorer = ModelScorer(reference_model(TINY, seed=1), progress=shown.advance)
            score_shards(
                manifest,
                scorer,
                name,
                passed_over=lambda shard, shown=shown: shown.pass_over(shard.documents, shard.tokens),
            )
        assert (shown.done, shown.done_tokens) == (12, manifest.totals.tokens)
    lines = capsys.readouterr().err.splitlines()
    assert all(re.fullmatch(r"(tiny|again) \d+/12 documents  [\d,]+ tokens/s  \d+ s left", line) for line in lines)
    last = [line for line in lines if "12/12" in line]
    assert [line.split()[0] for line in last] == ["tiny", "again"]  # the second time, nothing is scored
    assert all(line.endswith("  0 s left") for line in last)
