"""The documents of a manifest as an epoch orders them: what the stages before packing hand on to each other."""

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
    """`tokens`: int64 [n], bos and eos included; `key`: its `__key__` in the tar, the shard's name and its place."""

    key: str
    tokens: np.ndarray
    source: str
    language: str


@dataclass(frozen=True)
class DocumentStage:
    """A function of one document that gives as many token ids, and the name under which it is part of the stream."""

    name: str
    function: Callable[[Document], np.ndarray]


@dataclass(frozen=True)
class Corpus:
    """Immutable: a stage gives another by `dataclasses.replace`. Any document of any epoch is found at once, so a stage
    may depend on (manifest, seed, epoch, document) and on nothing that came before. Iterating gives the kept documents
    in stored order, as the samples of a WebDataset, for looking at.

    `seed`: of the order of shards and of documents in them; `filter`, `counts`: which documents are kept, and how many
    that is; `document_stages`: applied to each, in order; `mixture`: how often each source is gone over.
    """

    manifest: Manifest
    seed: int = 0
    filter: DocumentFilter | None = None
    counts: KeptCounts | None = None
    document_stages: tuple[DocumentStage, ...] = ()
    mixture: Mixture | None = None

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """Tokens that are kept of each shard, int64 [shards]. Raises InputError when they do not make a sample."""
        whole = np.array([shard.tokens for shard in self.manifest.shards], dtype=np.int64)
        tokens = self.counts.tokens if self.counts else whole
        if (total := int(tokens.sum())) < 2:
            raise InputError(f"manifest in {self.manifest.directory}: tokens={total} are kept, a sample needs 2")
        return tokens

    @property
    def shortest(self) -> int:
        """Tokens of the shortest kept document."""
        kept = self.counts.shortest if self.counts else (shard.shortest_document for shard in self.manifest.shards)
        return min(int(length) for length in kept if length)

    def groups(self, sequence_length: int) -> list[Group]:
        """The shards that are packed together, and how many samples of each an epoch has."""
        return make_groups(self.manifest, self.tokens, self.mixture, sequence_length)

    def identity(self) -> dict:
        """All that decides which documents come, how they read, and how often."""
        identity = {"manifest": self.manifest.content_hash, "seed": self.seed}
        if self.filter:
            identity |= {"filter": self.filter.filter_hash, "kept": self.counts.content_hash}
        if self.document_stages:
            identity["document_stages"] = [stage.name for stage in self.document_stages]
        if self.mixture:
            identity["mixture"] = {"epochs": self.mixture.epochs, "weights": self.mixture.weights}
        return identity

    def view(self, epoch: int, number: int) -> ShardView:
        """Shard `number` in the document order of `epoch`, without what the filter drops. Raises DamagedShard, also
        when the filter keeps something else now than when it was counted."""
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
        """What the stages make of the tokens of the document at a place of a view."""
        key, vocab_size = _key(shard, rows[place]), self.manifest.tokenizer.vocab_size
        for stage in self.document_stages:
            found = np.asarray(stage.function(Document(key, tokens, shard.source, language_code(languages[place]))))
            if found.shape != tokens.shape or found.dtype.kind not in "iu":
                raise InputError(
                    f"document stage {stage.name}: document {key}: {found.dtype} {list(found.shape)} for int64 "
                    f"{list(tokens.shape)}: a stage gives as many ids as it is given, since positions are found by sums"
                )
            if found.min() < 0 or found.max() >= vocab_size:
                raise InputError(f"document stage {stage.name}: document {key}: an id outside [0, {vocab_size})")
            tokens = found.astype(np.int64)
        return tokens


def _key(shard: Shard, row: int) -> str:
    return f"{shard.name.removesuffix('.tar')}_{row:07d}"
