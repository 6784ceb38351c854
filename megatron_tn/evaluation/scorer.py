"""Document scores by a model, for self-cleaning: implements `data_pipeline.selfclean.scorer.Scorer`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_tn.evaluation.perplexity import document_nats
from megatron_tn.model.base import Model


class ModelScorer:
    """options: of `row_scores`. As `batch_tokens`, about 4096 suit a CPU's cache, 16384 a GPU."""

    def __init__(self, model: Model, **options: Any):
        self.model = model
        self.options = options

    def document_nats(self, documents: Sequence[np.ndarray]) -> list[float]:
        """Negative log-likelihood in nats of each document (ids int64 [n], bos first), given its first id."""
        return document_nats(self.model, documents, **self.options)
