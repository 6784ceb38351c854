"""Scores of a shard's documents, kept beside it so that a new threshold needs neither the model nor new shards.

A set of scores has a name, such as that of the model that gave them. The sidecar of shard NAME.tar is
NAME.SCORES.scores.npy: float32 [documents, 2], nats per token and nats per byte of text, NaN for a document that was
not scored.
"""

import hashlib
import io
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from data_pipeline.errors import InputError
from data_pipeline.shards.manifest import Shard, replace_file

ScoresName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", max_length=60)]
MEASURES = ("nats_per_token", "nats_per_byte")


def scores_path(directory: Path, shard: Shard, name: str) -> Path:
    """Where the scores `name` of a shard lie."""
    return directory / f"{shard.name.removesuffix('.tar')}.{name}.scores.npy"


def save_scores(directory: Path, shard: Shard, name: str, scores: np.ndarray) -> Path:
    """Writes a shard's scores [documents, 2] whole or not at all."""
    if scores.shape != (shard.documents, len(MEASURES)):
        raise ValueError(f"shard {shard.name}: scores {scores.shape} for {shard.documents} documents")
    buffer = io.BytesIO()
    np.save(buffer, scores.astype(np.float32), allow_pickle=False)
    replace_file(path := scores_path(directory, shard, name), buffer.getvalue())
    return path


def load_scores(directory: Path, shard: Shard, name: str) -> tuple[np.ndarray, str]:
    """A shard's scores, float32 [documents, 2], and the sha256 of their file. Raises InputError naming the file when it
    is absent, damaged, holds a pickle or does not fit the shard."""
    path = scores_path(directory, shard, name)
    try:
        data = path.read_bytes()
        scores = np.load(io.BytesIO(data), allow_pickle=False)
    except OSError as error:
        raise InputError(f"scores {path.name}: {error.strerror or error}") from None
    except (ValueError, EOFError) as error:
        raise InputError(f"scores {path.name}: {error}") from None
    expected = (shard.documents, len(MEASURES))
    if not isinstance(scores, np.ndarray) or scores.dtype != np.float32 or scores.shape != expected:
        raise InputError(f"scores {path.name}: not float32 [{shard.documents}, {len(MEASURES)}]")
    return scores, hashlib.sha256(data).hexdigest()
