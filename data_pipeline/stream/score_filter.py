"""The stream's document filters: the self-cleaning filter, or a user-defined one.

Thresholds come from the config and scores from sidecar files, so that a new threshold rewrites no shard. The stream's
random access needs the number of kept tokens per shard: `KeptCounts`, counted once per filter by
`python -m data_pipeline.stream.count` and cached beside the manifest.
"""

import dataclasses
import functools
import hashlib
import json
import shlex
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Protocol

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from data_pipeline.errors import InputError
from data_pipeline.shards.content import Count, Shard
from data_pipeline.shards.index import LANGUAGE, TOKENS, language_code
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.scores import MEASURES, ScoresName, load_scores

Bound = Annotated[float, Field(strict=True)] | None  # strict: true is no 1.0
Band = tuple[Bound, Bound]
LARGEST = 1 << 18  # bytes of a filter's file
DEEPEST = 8  # collections inside one another in a filter's file
SHOWN = 80  # characters of a wrong value in a message


class DocumentFilter(Protocol):
    """Interface of a filter. `filter_hash`: hex; must differ between filters that keep different documents."""

    filter_hash: str

    def kept(self, read: Callable[[str], bytes], shard: Shard, index: np.ndarray) -> tuple[np.ndarray, str]:
        """(Kept documents of a shard, bool [documents]; sha256 of the sidecar files used, or ""). index:
        [documents, 4]; read(name): content of a file beside the shard. Raises InputError."""
        ...


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class ScoreFilter:
    """Keeps a document when low <= score <= high; null leaves a side open.

    `scores`: name of the sidecars' scores; `measure`: column of the scores; `bands`: (low, high) for `source/language`,
    `source` or `*/language`, in this order of priority; `default`: the band of all others.
    """

    scores: ScoresName
    measure: Literal[MEASURES] = "nats_per_token"
    default: Band = (None, None)
    bands: dict[str, Band] = Field(default_factory=dict)

    def __post_init__(self):
        for name, (low, high) in {"default": self.default, **self.bands}.items():
            if low is not None and high is not None and low > high:
                raise ValueError(f"band {name}: low={low} is above high={high}")

    @classmethod
    def load(cls, text: str) -> "ScoreFilter":
        """A filter from a YAML file, or from inline JSON (beginning with a brace). Raises InputError, a line per
        problem."""
        where = "filter" if text.lstrip().startswith("{") else f"filter={text}"
        try:
            if where == "filter":
                return FILTER.validate_json(text)
            return FILTER.validate_python(_read_yaml(Path(text)))
        except OSError as error:
            raise InputError(f"{where}: {error.strerror or error}") from None
        except ValidationError as error:
            found = {".".join(map(str, e["loc"])) or "document": e for e in error.errors()}
            if found.get("scores", {}).get("type") == "missing":
                known = ", ".join(field.name for field in dataclasses.fields(cls))
                raise InputError(f"{where}: it does not name its scores; a filter has {known}") from None
            raise InputError(
                *(f"{where}: {key}={str(e['input'])[:SHOWN]!r}: {e['msg']}" for key, e in found.items())
            ) from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: {' '.join(str(error).split())}") from None

    def to_json(self) -> str:
        return json.dumps(FILTER.dump_python(self, mode="json"), sort_keys=True)

    @functools.cached_property
    def filter_hash(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def kept(self, read: Callable[[str], bytes], shard: Shard, index: np.ndarray) -> tuple[np.ndarray, str]:
        """See `DocumentFilter`. Raises InputError naming the scores that are absent or damaged."""
        scores, digest = load_scores(read, shard, self.scores)
        return self.keep(shard, index, scores), digest

    def keep(self, shard: Shard, index: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Kept documents, bool [documents], from the shard's index [documents, 4] and scores [documents, 2]. Raises
        InputError naming the first document without a score."""
        values = scores[:, MEASURES.index(self.measure)]
        if not (scored := np.isfinite(values)).all():
            raise InputError(
                f"scores {self.scores} of shard {shard.name}: document {int(np.argmin(scored))} has no score; finish "
                "scoring first"
            )
        kept = np.ones(len(values), dtype=bool)
        for language in np.unique(index[:, LANGUAGE]):
            here = index[:, LANGUAGE] == language
            low, high = self.band(shard.source, language_code(language))
            kept &= ~here | ((values >= _bound(low, -np.inf)) & (values <= _bound(high, np.inf)))
        return kept

    def unused_bands(self, sources: Collection[str]) -> list[str]:
        """Names of bands that match no document of these sources."""
        known = {"*", *sources}
        return sorted(name for name in self.bands if name not in sources and name.rpartition("/")[0] not in known)

    def band(self, source: str, language: str) -> Band:
        """The band (low, high) of documents of this source and language."""
        for name in (f"{source}/{language}", source, f"*/{language}"):
            if name in self.bands:
                return self.bands[name]
        return self.default


FILTER = TypeAdapter(ScoreFilter)


def _bound(value: float | None, absent: float) -> np.float32:
    # In the scores' fp32: threshold 0.1 keeps a document with stored score 0.1.
    return np.float32(absent if value is None else value)


@dataclass(frozen=True)
class KeptCounts:
    """Counts of kept documents per shard: `documents`, `tokens`, `shortest` (in tokens; 0 where none is kept), int64
    [shards], and `scores_sha256` [shards] of the sidecars used."""

    documents: np.ndarray
    tokens: np.ndarray
    shortest: np.ndarray
    scores_sha256: tuple[str, ...]

    @classmethod
    def load(cls, manifest: Manifest, filter: DocumentFilter) -> "KeptCounts":
        """The cached counts of this filter and manifest. Raises InputError naming the counting command if there are
        none."""
        name, command = counts_file(manifest, filter), count_command(manifest, filter)
        where = f"filter: {manifest.place}/{name}"
        try:
            record = RECORD.validate_json(manifest.read(name))
        except FileNotFoundError:
            raise InputError(f"{where}: this filter's kept documents are not counted yet; run {command}") from None
        except ValidationError as error:
            raise InputError(f"{where}: {error.errors()[0]['msg']}; remove it and run {command}") from None
        except OSError as error:
            raise InputError(f"{where}: {error}") from None
        if (record.get("manifest"), record.get("filter")) != (manifest.content_hash, filter.filter_hash):
            raise InputError(f"{where}: counted for another manifest or filter; run {command}")
        rows = record.get("shards", [])
        if len(rows) != len(manifest.shards):
            raise InputError(f"{where}: {len(rows)} shards, the manifest has {len(manifest.shards)}; run {command}")
        numbers = np.array([row[:3] for row in rows], dtype=np.int64).reshape(-1, 3)
        return cls(*numbers.T.copy(), tuple(row[3] for row in rows))

    def row(self, number: int) -> "Row":
        counted = (int(column[number]) for column in (self.documents, self.tokens, self.shortest))
        return *counted, self.scores_sha256[number]

    @functools.cached_property
    def content_hash(self) -> str:
        """sha256 over all counts and the scores' hashes."""
        parts = [self.documents.tolist(), self.tokens.tolist(), self.shortest.tolist(), self.scores_sha256]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _read_yaml(path: Path) -> object:
    """The content of a YAML file. Raises OSError, and ValueError for one that is no YAML, too large, or has aliases,
    ten lines of which can stand for gigabytes."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if (size := path.stat().st_size) > LARGEST:
        raise ValueError(f"{size} bytes, more than {LARGEST}")
    text = path.read_text(encoding="utf-8")
    try:
        depth, mappings = 0, 0
        for event in yaml.parse(text):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise ValueError(f"nested deeper than {DEEPEST}")
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("an alias (*NAME) is not allowed")
            mappings += isinstance(event, yaml.MappingStartEvent)
        if not mappings:
            raise ValueError("no mapping of settings to values")
        return OmegaConf.to_container(OmegaConf.create(text))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(str(error)) from None


Row = tuple[int, int, int, str]
RECORD = TypeAdapter(dict[Literal["manifest", "filter", "shards"], str | list[tuple[Count, Count, Count, str]]])


def counts_file(manifest: Manifest, filter: DocumentFilter) -> str:
    """File name, beside the manifest, of a filter's cached counts. It includes the manifest's hash, as a folder may
    hold several manifests over time."""
    both = hashlib.sha256(f"{manifest.content_hash} {filter.filter_hash}".encode()).hexdigest()
    return f"kept-{both[:16]}.json"


def count_command(manifest: Manifest, filter: DocumentFilter) -> str:
    """The command that counts a filter's kept documents."""
    if isinstance(filter, ScoreFilter):
        argument = shlex.quote(filter.to_json())
        return f"python -m data_pipeline.stream.count {manifest.place}/manifest.json {argument}"
    return f"data_pipeline.stream.count.count(manifest, {filter!r})"


def count_row(index: np.ndarray, kept: np.ndarray, digest: str) -> Row:
    """A shard's entry in the cache: documents, tokens and shortest document kept, and the scores' sha256."""
    lengths = index[kept, TOKENS]
    return int(kept.sum()), int(lengths.sum()), int(lengths.min()) if len(lengths) else 0, digest
