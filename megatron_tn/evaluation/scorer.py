"""Document scores by a model, for self-cleaning: implements `data_pipeline.selfclean.scorer.Scorer`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from megatron_tn.evaluation.perplexity import document_nats
from megatron_tn.model.base import Model


class ModelScorer:
    """batch_tokens: tokens of one batch of documents; about 4096 suit a CPU's cache, 16384 a GPU. progress(n, tokens):
    told of n more documents done, of so many tokens."""

    def __init__(
        self,
        model: Model,
        batch_tokens: int = 4096,
        progress: Callable[[int, int], None] = lambda documents, tokens: None,
    ):
        self.model = model
        self.batch_tokens = batch_tokens
        self.progress = progress

    def document_nats(self, documents: Sequence[np.ndarray]) -> list[float]:
        """Negative log-likelihood in nats of each document (ids int64 [n], bos first), given its first id."""
        return document_nats(self.model, documents, batch_tokens=self.batch_tokens, progress=self.progress)
