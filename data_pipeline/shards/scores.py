"""Scores of a shard's documents in a sidecar file, so that a new threshold needs neither the model nor new shards.

A set of scores has a name SCORES, such as the model's. The sidecar of shard NAME.tar is NAME.SCORES.scores.npy: float32
[documents, 2], nats per token and nats per byte of text, NaN for a document that was not scored.
"""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from data_pipeline.errors import InputError
from data_pipeline.files import replace_file
from data_pipeline.shards.content import Shard
from data_pipeline.shards.index import read_npy

ScoresName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", max_length=60)]
MEASURES = ("nats_per_token", "nats_per_byte")


def scores_file(shard: Shard, name: str) -> str:
    return f"{shard.name.removesuffix('.tar')}.{name}.scores.npy"


def save_scores(directory: Path, shard: Shard, name: str, scores: np.ndarray) -> Path:
    """Writes a shard's scores [documents, 2] atomically."""
    if scores.shape != (shard.documents, len(MEASURES)):
        raise ValueError(f"shard {shard.name}: scores {scores.shape} for {shard.documents} documents")
    buffer = io.BytesIO()
    np.save(buffer, scores.astype(np.float32), allow_pickle=False)
    replace_file(path := directory / scores_file(shard, name), buffer.getvalue())
    return path


def load_scores(read: Callable[[str], bytes], shard: Shard, name: str) -> tuple[np.ndarray, str]:
    """(A shard's scores, float32 [documents, 2], sha256 of their file). `read(file name)`: the file's bytes. Raises
    InputError naming the file when it is absent, damaged, holds a pickle or does not fit the shard."""
    file = scores_file(shard, name)
    try:
        data = read(file)
        scores = read_npy(data, (shard.documents, len(MEASURES)), np.float32)
    except FileNotFoundError:
        how = f"python -m megatron_tn.score checkpoint=... manifest=... name={name}"
        raise InputError(f"scores {file}: no such file; {how} writes it") from None
    except OSError as error:
        raise InputError(f"scores {file}: {error.strerror or error}") from None
    except ValueError as error:
        raise InputError(f"scores {file}: {error}") from None
    return scores, hashlib.sha256(data).hexdigest()
