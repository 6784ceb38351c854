"""The training-time token stream: global sample index -> tokens, by random access and independent of the parallel
layout. `pipeline` lists its stages."""

from data_pipeline.errors import InputError
from data_pipeline.shards.manifest import Manifest
from data_pipeline.stream.corpus import Corpus, Document, DocumentStage
from data_pipeline.stream.loader import BatchLoader
from data_pipeline.stream.mixture import Mixture
from data_pipeline.stream.pipeline import (
    batches,
    build_stream,
    compose,
    load_document_stage,
    load_filter,
    token_stages,
)
from data_pipeline.stream.sample import IGNORED, Batch, Sample
from data_pipeline.stream.score_filter import ScoreFilter
from data_pipeline.stream.state import Ledger, StreamState
from data_pipeline.stream.token_stream import DamageLimitError, TokenStream
