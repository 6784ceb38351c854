"""The interface of the model that scores documents; `megatron_tn.evaluation.scorer` implements it."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Scorer(Protocol):
    """Any language model over the ids of the shards' tokenizer."""

    def document_nats(self, documents: Sequence[np.ndarray]) -> list[float]:
        """Negative log-likelihood in nats of each document (ids int64 [n], bos first), given its first id."""
        ...
