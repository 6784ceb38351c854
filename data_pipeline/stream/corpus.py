"""The documents of a manifest in the order of an epoch; passed between the stages before packing."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from data_pipeline.errors import InputError
from data_pipeline.shards.content import Shard
from data_pipeline.shards.index import LANGUAGE, OFFSET, TOKENS, language_code
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.reading import shard_index
from data_pipeline.stream.mixture import Group, Mixture, make_groups
from data_pipeline.stream.order import permutation
from data_pipeline.stream.score_filter import DocumentFilter, KeptCounts, count_row, counts_file
from data_pipeline.stream.shard_view import DamagedShard, ShardView


@dataclass(frozen=True)
class Document:
    """`tokens`: int64 [n], bos and eos included; `key`: shard name and index in the shard, webdataset's `__key__`."""

    key: str
    tokens: np.ndarray
    source: str
    language: str


@dataclass(frozen=True)
class DocumentStage:
    """A function from a document to as many token ids, and its name, which is part of the stream's hash."""

    name: str
    function: Callable[[Document], np.ndarray]


@dataclass(frozen=True)
class Corpus:
    """Immutable: a stage returns a changed copy by `dataclasses.replace`. Random access to any document of any epoch: a
    stage may depend only on (manifest, seed, epoch, document). Iteration yields the kept documents in stored order as
    WebDataset samples, for inspection.

    `seed`: for the order of shards and of their documents; `filter`, `counts`: kept documents and their counts per
    shard; `document_stages`: applied to each document, in order; `mixture`: repetitions of each source.
    """

    manifest: Manifest
    seed: int = 0
    filter: DocumentFilter | None = None
    counts: KeptCounts | None = None
    document_stages: tuple[DocumentStage, ...] = ()
    mixture: Mixture | None = None

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """Kept tokens of each shard, int64 [shards]. Raises InputError when they are too few for a sample."""
        whole = np.array([shard.tokens for shard in self.manifest.shards], dtype=np.int64)
        tokens = self.counts.tokens if self.counts else whole
        if (total := int(tokens.sum())) < 2:
            raise InputError(
                f"manifest in {self.manifest.directory}: tokens={total} are kept, but a sample needs at least 2: check "
                "data.filter and the shards"
            )
        return tokens

    @property
    def shortest(self) -> int:
        """Length of the shortest kept document in tokens."""
        kept = self.counts.shortest if self.counts else (shard.shortest_document for shard in self.manifest.shards)
        return min(int(length) for length in kept if length)

    def groups(self, sequence_length: int) -> list[Group]:
        """Groups of shards that are packed together, and their samples per epoch."""
        return make_groups(self.manifest, self.tokens, self.mixture, sequence_length)

    def identity(self) -> dict:
        """Everything that determines the documents, their tokens and their repetitions, for the stream's hash."""
        identity = {"manifest": self.manifest.content_hash, "seed": self.seed}
        if self.filter:
            identity |= {"filter": self.filter.filter_hash, "kept": self.counts.content_hash}
        if self.document_stages:
            identity["document_stages"] = [stage.name for stage in self.document_stages]
        if self.mixture:
            identity["mixture"] = {"epochs": self.mixture.epochs, "weights": self.mixture.weights}
        return identity

    def view(self, epoch: int, number: int) -> ShardView:
        """The kept documents of shard `number` in the order of `epoch`. Raises DamagedShard, also when the filter's
        kept documents differ from its counts."""
        index, rows = self._index(number)
        order = permutation(len(rows), self.seed, epoch, "documents", number)
        return self._open(number, index[order], rows[order])

    def __iter__(self) -> Iterator[dict]:
        """{"__key__", "tokens": int64 [n], "source", "language"} of each kept document. Raises DamagedShard."""
        for number, shard in enumerate(self.manifest.shards):
            index, rows = self._index(number)
            view = self._open(number, index, rows)
            for place in range(len(rows)):
                yield {
                    "__key__": _key(shard, rows[place]),
                    "tokens": view.document(place),
                    "source": shard.source,
                    "language": language_code(index[place, LANGUAGE]),
                }

    def _index(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The index of a shard's kept documents, int64 [kept, 4], and their places in the shard [kept]."""
        shard = self.manifest.shards[number]
        try:
            index = shard_index(self.manifest, shard)
            kept = np.ones(len(index), dtype=bool)
            if self.filter is not None:
                counted = self.counts.row(number)
                kept, digest = self.filter.kept(functools.partial(self.manifest.read, sha256=counted[-1]), shard, index)
                if count_row(index, kept, digest) != counted:
                    cache = f"{self.manifest.place}/{counts_file(self.manifest, self.filter)}"
                    raise InputError(
                        f"the scores are not those that {cache} was counted from: remove it and count again"
                    )
        except (InputError, OSError) as error:
            raise DamagedShard(f"shard {shard.name}: {error}") from None
        return index[kept], np.flatnonzero(kept)

    def _open(self, number: int, index: np.ndarray, rows: np.ndarray) -> ShardView:
        shard = self.manifest.shards[number]
        try:
            file = self.manifest.open(shard.name, size=shard.size, sha256=shard.sha256)
        except OSError as error:
            raise DamagedShard(f"shard {shard.name}: {error}") from None
        edit = functools.partial(self._edit, shard, index[:, LANGUAGE], rows) if self.document_stages else None
        return ShardView(
            shard.name, self.manifest.dtype, np.cumsum(index[:, TOKENS]), index[:, OFFSET].copy(), file, edit
        )

    def _edit(
        self, shard: Shard, languages: np.ndarray, rows: np.ndarray, place: int, tokens: np.ndarray
    ) -> np.ndarray:
        """The tokens of the document at index `place` of a view, after the document stages."""
        key, vocab_size = _key(shard, rows[place]), self.manifest.tokenizer.vocab_size
        for stage in self.document_stages:
            found = np.asarray(stage.function(Document(key, tokens, shard.source, language_code(languages[place]))))
            if found.shape != tokens.shape or found.dtype.kind not in "iu":
                raise InputError(
                    f"document stage {stage.name}: document {key}: {found.dtype} {list(found.shape)} for int64 "
                    f"{list(tokens.shape)}: a stage must return as many ids as it is given"
                )
            if found.min() < 0 or found.max() >= vocab_size:
                raise InputError(f"document stage {stage.name}: document {key}: an id outside [0, {vocab_size})")
            tokens = found.astype(np.int64)
        return tokens


def _key(shard: Shard, row: int) -> str:
    return f"{shard.name.removesuffix('.tar')}_{row:07d}"
