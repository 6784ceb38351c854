"""The file of sampled documents: JSON lines, each the fields of `Sample` and the document's `text`.

The file is self-contained: audit and summary need neither shards nor tokenizer. Texts stay on disk and are read one at
a time.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from data_pipeline.audit.sampling import PLACES
from data_pipeline.errors import InputError
from data_pipeline.files import replacing
from data_pipeline.shards.scores import MEASURES

Count = Annotated[int, Field(ge=0, strict=True)]


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Sample:
    """A document to be judged.

    id: hash of source and text (`sample_id`), so that verdicts remain valid in later rounds. shard, position: location;
    document, key: its id and key in the shard. bytes, tokens, characters: of the whole document; `text` may be only its
    beginning. verdict: the filter's; it keeps low <= score <= high of `measure`. place: tail, border or middle, the
    reason for sampling. stratum_documents: documents in the corpus with the same source, language, place and verdict;
    probability: the share of them that was sampled; None if not stratified.
    """

    id: Annotated[str, Field(min_length=1, max_length=200)]
    source: str
    verdict: Literal["keep", "drop"]
    place: Literal[PLACES]
    measure: Literal[MEASURES] = "nats_per_token"
    nats_per_token: float | None = None
    nats_per_byte: float | None = None
    low: float | None = None
    high: float | None = None
    language: str = ""
    document: str = ""
    key: str = ""
    shard: str = ""
    position: Count = 0
    bytes: Count = 0
    tokens: Count = 0
    characters: Count = 0
    stratum_documents: Annotated[int, Field(ge=1, strict=True)] | None = None
    probability: Annotated[float, Field(gt=0, le=1)] | None = None

    @property
    def score(self) -> float | None:
        """The score compared with the filter's band, in nats."""
        return getattr(self, self.measure)

    @property
    def stratum(self) -> tuple[str, str, str, str]:
        return self.source, self.language, self.place, self.verdict


SAMPLE = TypeAdapter(Sample)


def sample_id(source: str, text: str) -> str:
    """16 hex digits of the sha256 of a source's name and a whole text."""
    return hashlib.sha256(f"{source}\0{text}".encode("utf-8", "replace")).hexdigest()[:16]


def write_samples(path: Path, samples: Iterable[tuple[Sample, str]], *, overwrite: bool = False) -> int:
    """Writes samples and texts atomically, in the given order; returns their number. Raises InputError when `path`
    exists and `overwrite` is False, or cannot be written."""
    if path.exists() and not overwrite:
        raise InputError(f"samples={path} is there already; choose another, or overwrite=true to replace it")
    count = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, mode=0o600) as file:
            for sample, text in samples:
                line = json.dumps({**asdict(sample), "text": text}, ensure_ascii=False)
                file.write(line.encode("utf-8", "replace") + b"\n")
                count += 1
    except OSError as error:
        raise InputError(f"samples={path}: {error.strerror or error}") from None
    return count


@dataclass(frozen=True)
class Samples:
    """A checked file of samples: metadata in memory, texts on disk. Make one with `load`."""

    path: Path
    entries: tuple[Sample, ...]
    offsets: tuple[int, ...]

    @classmethod
    def load(cls, path: str | Path) -> "Samples":
        """Raises InputError naming lines that are no samples, and duplicate ids."""
        path = Path(path)
        entries, offsets, problems = [], [], []
        try:
            with path.open("rb") as file:
                offset = 0
                for number, line in enumerate(file, 1):
                    try:
                        entries.append(_parse(line)[0])
                        offsets.append(offset)
                    except ValueError as error:
                        problems.append(f"samples={path}: line {number}: {error}")
                    offset += len(line)
        except OSError as error:
            raise InputError(f"samples={path}: {error.strerror or error}") from None
        twice = [name for name, times in Counter(entry.id for entry in entries).items() if times > 1]
        problems += [f"samples={path}: id={name!r} is given more than once" for name in twice]
        if not entries and not problems:
            problems = [f"samples={path}: holds no samples"]
        if problems:
            raise InputError(*problems)
        return cls(path, tuple(entries), tuple(offsets))

    def __len__(self) -> int:
        return len(self.entries)

    def text(self, index: int) -> str:
        """The text of sample `index`. Raises OSError, or ValueError when the file changed since it was loaded."""
        with self.path.open("rb") as file:
            file.seek(self.offsets[index])
            sample, text = _parse(file.readline())
        if sample.id != self.entries[index].id:
            raise ValueError("the file of samples changed since it was loaded")
        return text


def _parse(line: bytes) -> tuple[Sample, str]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(record, dict) or not isinstance(text := record.pop("text", None), str):
        raise ValueError("no object with a text")
    try:
        return SAMPLE.validate_python(record), text
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        value = "" if first["type"] == "missing" else f"={str(first['input'])[:60]!r}"
        raise ValueError(f"{name}{value}: {first['msg']}") from None
