"""Scores every document of a folder of shards with a model, and writes sidecar files for the stream's filter.

Sidecars are written atomically, shard by shard, so a killed run continues with the next shard. New thresholds need
neither the model nor new scores.
"""

from collections.abc import Callable

import numpy as np

from data_pipeline.selfclean.scorer import Scorer
from data_pipeline.shards.manifest import Manifest, Shard
from data_pipeline.shards.reading import read_shard
from data_pipeline.shards.scores import save_scores, scores_file


def score_shards(
    manifest: Manifest,
    scorer: Scorer,
    name: str,
    *,
    rank: int = 0,
    size: int = 1,
    passed_over: Callable[[Shard], None] = lambda shard: None,
) -> int:
    """Writes scores `name` beside every shard without them; returns the number of scored documents.

    Process `rank` of `size` takes every size-th shard. `passed_over(shard)`: called for each that has scores. A
    document without text (only bos and eos) scores NaN per byte. Raises InputError when a remote folder is not
    writable.
    """
    scored, there = 0, manifest.names()
    for shard in manifest.shards[rank::size]:
        if scores_file(shard, name) in there:
            passed_over(shard)
            continue
        documents = list(read_shard(manifest, shard))
        nats = np.array(scorer.document_nats([document.tokens for document in documents]))
        predicted = np.array([len(document.tokens) - 1 for document in documents])
        text_bytes = np.array([document.metadata["bytes"] for document in documents], dtype=float)
        text_bytes[text_bytes == 0] = np.nan
        path = save_scores(manifest.directory, shard, name, np.stack([nats / predicted, nats / text_bytes], axis=1))
        manifest.publish(path.name)
        scored += len(documents)
    return scored
