"""What self-cleaning needs of a model: how surprising it finds a document. `megatron_tn.evaluation.scorer` has one."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Scorer(Protocol):
    """Any language model over the ids of the shards' tokenizer."""

    def document_nats(self, documents: Sequence[np.ndarray]) -> list[float]:
        """Negative log-likelihood in nats of each document (ids int64 [n], bos first), given its first id."""
        ...
