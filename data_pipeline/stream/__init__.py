"""The training-time stream: global sample index -> tokens, whatever the topology, from any point at once."""

from data_pipeline.errors import InputError
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.reading import StoredDocument, read_documents
from data_pipeline.stream.loader import BatchLoader
from data_pipeline.stream.mixture import Mixture
from data_pipeline.stream.sample import IGNORED, Batch, Sample, batches_hash
from data_pipeline.stream.score_filter import ScoreFilter
from data_pipeline.stream.state import Ledger, StreamState
from data_pipeline.stream.token_stream import DamageLimitError, TokenStream

__all__ = [
    "IGNORED",
    "Batch",
    "BatchLoader",
    "DamageLimitError",
    "InputError",
    "Ledger",
    "Manifest",
    "Mixture",
    "Sample",
    "ScoreFilter",
    "StoredDocument",
    "StreamState",
    "TokenStream",
    "batches_hash",
    "read_documents",
]
