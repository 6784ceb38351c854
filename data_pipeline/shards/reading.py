"""Reads whole documents from shards, in stored order, for evaluation, checks and inspection."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_pipeline.errors import InputError
from data_pipeline.shards.content import Shard
from data_pipeline.shards.index import OFFSET, TOKENS, build_index, index_bytes, parse_index
from data_pipeline.shards.manifest import Manifest


@dataclass(frozen=True)
class StoredDocument:
    """`tokens`: int64 [n], bos and eos included; `metadata`: id, source, bytes (of UTF-8 text), tokens."""

    tokens: np.ndarray
    metadata: dict


def shard_index(manifest: Manifest, shard: Shard) -> np.ndarray:
    """A shard's index, int64 [documents, 4], checked against the manifest. Raises InputError or OSError."""
    data = manifest.read(shard.index, sha256=shard.index_sha256, most=index_bytes(shard.documents))
    # An index of other documents may have the same totals but other offsets.
    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        raise InputError(f"index {shard.index}: its sha256 is not the manifest's")
    return parse_index(data, shard, manifest.dtype.itemsize)


def read_documents(manifest: Manifest) -> Iterator[StoredDocument]:
    """Every document of every shard, in the manifest's order. Raises InputError naming a shard that cannot be read."""
    for shard in manifest.shards:
        yield from read_shard(manifest, shard)


def read_shard(manifest: Manifest, shard: Shard) -> Iterator[StoredDocument]:
    path = manifest.local(shard.name, size=shard.size, sha256=shard.sha256)
    index, metadata = build_index(path, manifest.dtype.itemsize)
    with path.open("rb") as file:
        for (offset, tokens), record in zip(index[:, [OFFSET, TOKENS]].tolist(), metadata, strict=True):
            file.seek(offset)
            payload = file.read(tokens * manifest.dtype.itemsize)
            if len(payload) != tokens * manifest.dtype.itemsize:
                raise InputError(f"shard {shard.name}: truncated in document {record.get('id')!r}")
            yield StoredDocument(np.frombuffer(payload, manifest.dtype).astype(np.int64), record)
