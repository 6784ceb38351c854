"""Tar shards of tokenised documents, their index and their manifest: written, read, verified."""

from data_pipeline.shards.content import Shard, TokenizerInfo
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.reading import StoredDocument, read_documents

__all__ = ["Manifest", "Shard", "StoredDocument", "TokenizerInfo", "read_documents"]
