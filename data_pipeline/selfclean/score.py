"""Scores every document of a folder of shards with a model, once: the sidecars that the stream's filter reads.

Shard by shard, each sidecar written whole or not at all, so a killed run goes on where it stopped and computes no score
twice; later thresholds need neither the model nor new scores.
"""

from collections.abc import Callable

import numpy as np

from data_pipeline.selfclean.scorer import Scorer
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.reading import read_shard
from data_pipeline.shards.scores import save_scores, scores_file


def score_shards(
    manifest: Manifest,
    scorer: Scorer,
    name: str,
    *,
    rank: int = 0,
    size: int = 1,
    progress: Callable[[int], None] = lambda documents: None,
) -> int:
    """Writes the scores `name` beside every shard that has none yet; returns how many documents were scored.

    Process `rank` of `size` takes every size-th shard. `progress(n)` is told of n more documents done. A document
    without text (bos and eos alone) scores NaN per byte. Raises InputError where a remote folder cannot be written to.
    """
    scored, there = 0, manifest.names()
    for shard in manifest.shards[rank::size]:
        if scores_file(shard, name) in there:
            progress(shard.documents)
            continue
        documents = list(read_shard(manifest, shard))
        nats = np.array(scorer.document_nats([document.tokens for document in documents]))
        predicted = np.array([len(document.tokens) - 1 for document in documents])
        text_bytes = np.array([document.metadata["bytes"] for document in documents], dtype=float)
        text_bytes[text_bytes == 0] = np.nan
        path = save_scores(manifest.directory, shard, name, np.stack([nats / predicted, nats / text_bytes], axis=1))
        manifest.publish(path.name)
        scored += len(documents)
        progress(len(documents))
    return scored
