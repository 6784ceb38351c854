"""The stream as a WebDataset pipeline: shards -> documents -> filter -> your stages -> mixture -> packing -> batches.

    stages = token_stages(manifest, sequence_length=2048, seed=0, filter=ScoreFilter.load("conf/score_filter.yaml"))
    for step in webdataset.DataPipeline(*stages, batches(plan, micro_batch=8)):
        ...

A stage is a callable from the previous stage's result, as in `webdataset.DataPipeline`. Before packing, the result is a
`Corpus` with random access, not an iterator, which would reach sample 10^12 only by reading all samples before; so
global batch k is a function of (manifest, filter, stages, mixture, seed, k) for any list of stages. From `batches` on,
the result is an iterator, and webdataset's own stages may follow.

Every stage has a name and can be left out or replaced: `token_stages` is a list. A user-defined stage takes and returns
a `Corpus` (`each_document` makes one from a function of a document).
"""

import dataclasses
import functools
import importlib
import re
from collections.abc import Callable, Iterable
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.shards.manifest import Manifest
from data_pipeline.stream.corpus import Corpus, DocumentStage
from data_pipeline.stream.loader import BatchLoader, Plan
from data_pipeline.stream.mixture import Mixture
from data_pipeline.stream.score_filter import DocumentFilter, KeptCounts, ScoreFilter
from data_pipeline.stream.token_stream import TokenStream

Stage = Callable[..., Any]
NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # module:object
CorpusStage = Callable[[Corpus], Corpus]


def token_stages(
    manifest: Manifest,
    *,
    sequence_length: int,
    seed: int,
    filter: DocumentFilter | None = None,
    document_stages: Iterable[DocumentStage] = (),
    mixture: Mixture | None = None,
    **packing: Any,
) -> list[Stage]:
    """The stages from shards to samples. `packing`: the other arguments of `TokenStream`."""
    return [
        shards(manifest),
        documents(seed),
        *([keep(filter)] if filter else []),
        *(each_document(stage) for stage in document_stages),
        *([mix(mixture)] if mixture else []),
        pack(sequence_length, **packing),
    ]


def compose(stages: Iterable[Stage]) -> Any:
    """The last stage's result; for `token_stages`, a `TokenStream`."""
    first, *others = stages
    return functools.reduce(lambda given, stage: stage(given), others, first())


def build_stream(manifest: Manifest, **options: Any) -> TokenStream:
    """`compose` of `token_stages` with these arguments."""
    return compose(token_stages(manifest, **options))


def shards(manifest: Manifest) -> Callable[[], Corpus]:
    """All documents of a manifest's shards, as stored."""
    return lambda: Corpus(manifest)


def documents(seed: int) -> CorpusStage:
    """Shuffles shards, and documents within shards, by `seed` and epoch."""
    return _stage("documents", lambda corpus: dataclasses.replace(corpus, seed=seed))


def keep(filter: DocumentFilter) -> CorpusStage:
    """Keeps the documents of a filter, with counts cached by `data_pipeline.stream.count`. Raises InputError naming
    that command when there are none."""

    def stage(corpus: Corpus) -> Corpus:
        if corpus.filter is not None:
            raise InputError(f"keep({filter}): the documents are filtered already, by {corpus.filter}")
        return dataclasses.replace(corpus, filter=filter, counts=KeptCounts.load(corpus.manifest, filter))

    return _stage("keep", stage)


def each_document(stage: DocumentStage) -> CorpusStage:
    """Applies a function to every document; it must return as many token ids."""
    return _stage(
        f"each_document({stage.name})",
        lambda corpus: dataclasses.replace(corpus, document_stages=(*corpus.document_stages, stage)),
    )


def mix(mixture: Mixture) -> CorpusStage:
    """Sets the mixture of sources."""
    return _stage("mix", lambda corpus: dataclasses.replace(corpus, mixture=mixture))


def pack(sequence_length: int, **options: Any) -> Callable[[Corpus], TokenStream]:
    """Concatenates documents and cuts them into samples; `options`: arguments of `TokenStream`."""
    return _stage("pack", lambda corpus: TokenStream(corpus, sequence_length=sequence_length, **options))


def batches(plan: Plan, **options: Any) -> Callable[[TokenStream], BatchLoader]:
    """A rank's microbatches, step by step; `options`: arguments of `BatchLoader`."""
    return lambda stream: BatchLoader(stream, plan, **options)


def load_filter(text: str) -> DocumentFilter:
    """A filter from a YAML file or inline JSON of a `ScoreFilter`, or from `module:object`. Raises InputError."""
    if NAME.fullmatch(text):
        found = _load("filter", text)
        if not (isinstance(getattr(found, "filter_hash", None), str) and callable(getattr(found, "kept", None))):
            raise InputError(f"filter={text}: it is {found!r}, which has no filter_hash and no method kept")
        return found
    return ScoreFilter.load(text)


def load_document_stage(name: str) -> DocumentStage:
    """A document stage from `module:function`, which is also its name in the stream's hash. Raises InputError."""
    function = _load("document_stages", name)
    if not callable(function):
        raise InputError(f"document_stages={name}: it is {function!r}, which is no function")
    return DocumentStage(name, function)


def _load(setting: str, name: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"{setting}={name}: {error}; it must be module:name, importable from here") from None


def _stage(name: str, function: Callable[[Corpus], Any]) -> Callable[[Corpus], Any]:
    """`function` with a check that its argument is a Corpus, not an iterator."""

    def stage(corpus: Corpus) -> Any:
        if not isinstance(corpus, Corpus):
            raise InputError(
                f"stage {name} was given a {type(corpus).__name__}: every stage before packing must give a Corpus; "
                "each_document makes such a stage from a function of a document"
            )
        return function(corpus)

    stage.__name__ = stage.__qualname__ = name
    return stage
