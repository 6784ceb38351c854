"""Writing, reading and verifying tar shards of tokenised documents, their indexes and manifests."""

from data_pipeline.shards.content import Shard, TokenizerInfo
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.reading import StoredDocument, read_documents, read_shard

__all__ = ["Manifest", "Shard", "StoredDocument", "TokenizerInfo", "read_documents", "read_shard"]
